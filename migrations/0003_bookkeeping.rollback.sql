-- "cacheservice unwatch" first, or "cacheservice watch" again by the older version: its triggers do what it knows.
DROP TRIGGER note_truncated ON cacheservice.changes;
DROP TRIGGER note_deleted ON cacheservice.changes;
DROP FUNCTION cacheservice.note_deleted();
DROP FUNCTION cacheservice.wal_receiver();
ALTER TABLE cacheservice.changes REPLICA IDENTITY DEFAULT;
ALTER TABLE cacheservice.watched DROP COLUMN form;
ALTER TABLE cacheservice.pruned DROP COLUMN truncations;
COMMENT ON COLUMN cacheservice.changes.keys IS
    'The keys of its rows before and after, as text; an array of arrays if a key has several columns. '
    'NULL: a TRUNCATE, or a statement that changed more than a million rows.';

-- As 0002_changes.sql has them.
-- All that a refresh has to know, in one call: a first row with the state, and, if it has nothing against a delta, a row
-- for each key that was changed by transactions that `previous` does not see, at most `most` of them and one more.
--
-- The state must be what it was when `previous` was taken, but for what only describes:
-- - server: a restart or a crash may have lost transactions that had been seen (synchronous_commit = off, a failover),
--   and their numbers are given again. A crash resets the statistics, and with them the second moment.
-- - tables: their partitions, their storage (TRUNCATE, rewriting by ALTER TABLE), their columns.
--
-- On a standby pg_current_snapshot() does not list the transactions in progress, so all from xmin on are taken: keys
-- that are read again without need do no harm.
CREATE OR REPLACE FUNCTION cacheservice.changes(watches jsonb, previous pg_snapshot, most integer)
RETURNS TABLE (state jsonb, problem text, key text)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    each jsonb;
    name text;
    table_oid oid;
    columns name[];
    watch cacheservice.watched;
    tree oid[];
    complete bigint;
    watched_ids integer[] := '{}';
    width integer;
    tables jsonb := '{}';
BEGIN
    FOR each IN SELECT * FROM jsonb_array_elements(watches) LOOP
        name := each ->> 'table';
        table_oid := (each ->> 'relation')::oid;
        columns := ARRAY(SELECT jsonb_array_elements_text(each -> 'key'));
        width := cardinality(columns);
        IF table_oid IS NULL THEN
            problem := format('there is no table %s', name);
            EXIT;
        END IF;
        -- What is recorded are values of its rows.
        IF NOT has_table_privilege(session_user, table_oid, 'SELECT') THEN
            problem := format('%s may not read %s; GRANT SELECT ON %s TO %1$I', session_user, name, name);
            EXIT;
        END IF;
        SELECT w.* INTO watch FROM cacheservice.watched AS w WHERE w.relation = table_oid AND w.key_columns = columns;
        IF NOT FOUND THEN
            problem := format('%s is not watched; say: cacheservice watch %s%s', name, name,
                              (SELECT string_agg(' --key ' || c, '') FROM unnest(columns) AS c));
            EXIT;
        END IF;
        -- A statement fires only the triggers of the table that it names, be it the parent or a child.
        IF EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = watch.relation) THEN
            problem := format('%s has become a partition or a child of another table; watch that', name);
            EXIT;
        END IF;
        WITH RECURSIVE family AS (
            SELECT watch.relation::oid AS oid
            UNION
            SELECT i.inhrelid FROM pg_inherits AS i JOIN family AS f ON i.inhparent = f.oid
        )
        SELECT array_agg(f.oid ORDER BY f.oid),
               count(*) FILTER (WHERE 4 = (
                   SELECT count(*) FROM pg_trigger AS t
                   WHERE t.tgrelid = f.oid AND t.tgenabled = 'A' AND t.tgname LIKE 'cacheservice\_' || watch.id || '\_%'
               ))
        INTO tree, complete FROM family AS f;
        IF complete < cardinality(tree) THEN
            problem := format('%s or a partition of it lacks a trigger of ours; say again: cacheservice watch %s%s', name, name,
                              (SELECT string_agg(' --key ' || c, '') FROM unnest(columns) AS c));
            EXIT;
        END IF;
        -- Its worker fires no trigger for statements (PostgreSQL manual, 29.7).
        IF EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = ANY (tree)) THEN
            problem := format('%s is filled by logical replication, which fires no such trigger', name);
            EXIT;
        END IF;
        watched_ids := watched_ids || watch.id;
        tables := tables || jsonb_build_object(name, jsonb_build_object(
            'watched', watch.id,
            'notifies', watch.notifies,
            'since', watch.since_xid::text,
            'relations', (SELECT jsonb_agg(pg_relation_filenode(t.oid) ORDER BY t.oid) FROM unnest(tree) AS t (oid)),
            'columns', (
                -- A virtual column's expression can be changed without a change of any row.
                SELECT jsonb_agg(concat_ws(' ', a.attname, a.atttypid, a.atttypmod,
                                           CASE WHEN a.attgenerated <> '' THEN pg_get_expr(d.adbin, d.adrelid) END)
                                 ORDER BY a.attnum)
                FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
                WHERE a.attrelid = watch.relation AND a.attnum > 0 AND NOT a.attisdropped
            ),
            'key_types', (
                -- Of those that others made, enums alone are fit to be compared as text.
                SELECT jsonb_agg(CASE WHEN t.typtype = 'd' THEN t.typbasetype
                                      WHEN t.typtype = 'e' OR t.oid < 16384 THEN t.oid
                                      ELSE 0 END::bigint ORDER BY c.position)
                FROM unnest(columns) WITH ORDINALITY AS c (name, position)
                JOIN pg_attribute AS a ON a.attrelid = watch.relation AND a.attname = c.name
                JOIN pg_type AS t ON t.oid = a.atttypid
            )
        ));
        IF previous IS NOT NULL THEN
            IF NOT pg_visible_in_snapshot(watch.since_xid, previous) THEN
                problem := format('%s has been watched only since the last refresh', name);
            ELSIF EXISTS (
                SELECT FROM cacheservice.changes AS c
                WHERE c.watched = watch.id AND c.keys IS NULL AND c.xid >= pg_snapshot_xmin(previous)
                  AND (pg_is_in_recovery() OR NOT pg_visible_in_snapshot(c.xid, previous))
            ) THEN
                problem := format('%s was truncated, or more than a million of its rows changed at once', name);
            END IF;
        END IF;
    END LOOP;
    IF previous IS NOT NULL AND problem IS NULL
       AND (SELECT p.through >= pg_snapshot_xmin(previous) FROM cacheservice.pruned AS p) THEN
        problem := 'the changes since the last refresh are not kept any more';
    END IF;
    state := jsonb_build_object(
        'server', pg_postmaster_start_time() || ' ' || coalesce((SELECT b.stats_reset FROM pg_stat_bgwriter AS b)::text, '')
                  || ' ' || (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()),
        'tables', tables
    );
    RETURN NEXT;
    IF previous IS NULL OR problem IS NOT NULL THEN
        RETURN;
    END IF;
    IF width = 1 THEN
        RETURN QUERY
        SELECT DISTINCT NULL::jsonb, NULL::text, k.key
        FROM cacheservice.changes AS c CROSS JOIN LATERAL unnest(c.keys) AS k (key)
        WHERE c.watched = ANY (watched_ids) AND c.xid >= pg_snapshot_xmin(previous)
          AND (pg_is_in_recovery() OR NOT pg_visible_in_snapshot(c.xid, previous))
        LIMIT most + 1;
    ELSE
        RETURN QUERY
        SELECT DISTINCT NULL::jsonb, NULL::text, k.key
        FROM cacheservice.changes AS c
        CROSS JOIN LATERAL (
            SELECT jsonb_agg(u.value ORDER BY u.position)::text AS key
            FROM unnest(c.keys) WITH ORDINALITY AS u (value, position)
            GROUP BY (u.position - 1) / width
        ) AS k
        WHERE c.watched = ANY (watched_ids) AND c.xid >= pg_snapshot_xmin(previous)
          AND (pg_is_in_recovery() OR NOT pg_visible_in_snapshot(c.xid, previous))
        LIMIT most + 1;
    END IF;
END
$$;

-- Deletes what is older than `keep`, the oldest first, at most `most` rows of each watched table a call. What a transaction
-- that still runs has recorded stays, and so does all that is younger than it: nobody has seen it yet.
CREATE OR REPLACE FUNCTION cacheservice.prune(keep interval, most integer DEFAULT 10000)
RETURNS bigint
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    watched_id integer;
    greatest_xid xid8;
    deleted bigint;
    total bigint := 0;
BEGIN
    -- One at a time; the others have nothing to do.
    IF NOT pg_try_advisory_xact_lock(hashtextextended('cacheservice.prune', 0)) THEN
        RETURN 0;
    END IF;
    FOR watched_id IN SELECT w.id FROM cacheservice.watched AS w LOOP
        WITH oldest AS (
            SELECT c.ctid, c.changed_at FROM cacheservice.changes AS c
            WHERE c.watched = watched_id AND c.xid < pg_snapshot_xmin(pg_current_snapshot())
            ORDER BY c.xid LIMIT most
        ), gone AS (
            DELETE FROM cacheservice.changes AS c USING oldest AS o
            WHERE c.ctid = o.ctid AND o.changed_at < clock_timestamp() - keep
            RETURNING c.xid
        )
        SELECT count(*), (array_agg(g.xid ORDER BY g.xid DESC))[1] INTO deleted, greatest_xid FROM gone AS g;
        IF deleted > 0 THEN
            UPDATE cacheservice.pruned AS p SET through = greatest_xid WHERE p.through < greatest_xid;
            total := total + deleted;
        END IF;
    END LOOP;
    RETURN total;
END
$$;
DELETE FROM cacheservice._yoyo_migration WHERE migration_id = '0003_bookkeeping';
