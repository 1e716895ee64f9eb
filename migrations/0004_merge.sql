-- What one statement may change unseen: a MERGE that moves rows to another partition, more keys than an array can hold,
-- rows of a foreign table. And how old the oldest recorded change is.

COMMENT ON COLUMN cacheservice.watched.form IS
    '2: its functions never fail a writer, and belong to the owner of cacheservice.changes. '
    '3: they limit the bytes of the keys of a statement, too, record none of an UPDATE of a partitioned table that may '
    'be a MERGE, and the one for rows survives a change of the table''s columns.';
COMMENT ON COLUMN cacheservice.changes.keys IS
    'The keys of its rows before and after, as text; an array of arrays if a key has several columns. '
    'NULL: unknown, after a TRUNCATE, a statement that changed more than a million rows or 100 MB of keys, one whose key has '
    'no column, or one that may be a MERGE that moved rows to another partition.';

-- All that a refresh has to know, in one call: a first row with the state, and, if it has nothing against a delta, a row
-- for each key that was changed by transactions that `previous` does not see, at most `most` of them and one more.
--
-- The state must be what it was when `previous` was taken, but for what only describes:
-- - server: a restart or a crash may have lost transactions that had been seen (synchronous_commit = off, a failover),
--   and their numbers are given again. A crash resets the statistics, and with them the second moment.
-- - kept: whether somebody has truncated or rewritten the table of changes, or changed rights on it or on the schema:
--   what was written meanwhile may not have been recorded.
-- - tables: their partitions, their storage (TRUNCATE, rewriting by ALTER TABLE), their columns, and the versions of their
--   triggers and of the functions of those, which somebody may have changed and changed back.
--
-- On a standby pg_current_snapshot() does not list the transactions in progress, so all from xmin on are taken: keys
-- that are read again without need do no harm.
--
-- Its statements about catalogs are planned once in a session, whatever their cost seems to be: to plan them takes longer
-- than to run them.
CREATE OR REPLACE FUNCTION cacheservice.changes(watches jsonb, previous pg_snapshot, most integer)
RETURNS TABLE (state jsonb, problem text, key text)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
AS $$
DECLARE
    each jsonb;
    name text;
    table_oid oid;
    columns name[];
    -- Not cacheservice.watched: without that table not even the function would start.
    watch record;
    owner oid;
    missing text;
    foreign_table text;
    merging_rule text;
    again text;
    kind "char";
    tree oid[];
    triggers record;
    attributes record;
    watched_ids integer[] := '{}';
    width integer;
    tables jsonb := '{}';
BEGIN
    state := '{"server": "", "kept": "", "tables": {}}';
    IF NOT has_schema_privilege(current_user, 'cacheservice', 'USAGE')
       OR NOT coalesce(has_table_privilege(current_user, to_regclass('cacheservice.changes'), 'SELECT'), true) THEN
        problem := format('%s, which owns the functions in the schema cacheservice, may not use its tables; '
                          'say: cacheservice migrate', current_user);
        RETURN NEXT;
        RETURN;
    END IF;
    SELECT string_agg(t.name, ', ') INTO missing
    FROM unnest(ARRAY['changes', 'watched', 'pruned']) AS t (name)
    WHERE to_regclass('cacheservice.' || t.name) IS NULL;
    IF missing IS NOT NULL THEN
        problem := format('of the schema cacheservice the tables %s are missing; say: cacheservice migrate', missing);
        RETURN NEXT;
        RETURN;
    END IF;
    SELECT c.relowner INTO owner FROM pg_class AS c WHERE c.oid = 'cacheservice.changes'::regclass;
    FOR each IN SELECT * FROM jsonb_array_elements(watches) LOOP
        name := each ->> 'table';
        table_oid := (each ->> 'relation')::oid;
        columns := ARRAY(SELECT jsonb_array_elements_text(each -> 'key'));
        width := cardinality(columns);
        again := format('cacheservice watch %s%s', name, (SELECT string_agg(' --key ' || c, '') FROM unnest(columns) AS c));
        IF table_oid IS NULL THEN
            problem := format('there is no table %s', name);
            EXIT;
        END IF;
        -- What is recorded are values of its rows.
        IF NOT has_table_privilege(session_user, table_oid, 'SELECT') THEN
            problem := format('%s may not read %s; GRANT SELECT ON %s TO %1$I', session_user, name, name);
            EXIT;
        END IF;
        SELECT c.relkind INTO kind FROM pg_class AS c WHERE c.oid = table_oid;
        SELECT w.* INTO watch FROM cacheservice.watched AS w WHERE w.relation = table_oid AND w.key_columns = columns;
        -- PostgreSQL puts no row of a foreign table into a transition table: it fails the statement.
        WITH RECURSIVE family AS (
            SELECT table_oid AS oid
            UNION
            SELECT i.inhrelid FROM pg_inherits AS i JOIN family AS f ON i.inhparent = f.oid
        )
        SELECT array_agg(f.oid ORDER BY f.oid),
               min(f.oid::regclass::text) FILTER (WHERE 'f' = (SELECT c.relkind FROM pg_class AS c WHERE c.oid = f.oid))
        INTO tree, foreign_table FROM family AS f;
        IF foreign_table IS NOT NULL THEN
            problem := CASE
                WHEN watch.id IS NULL THEN format(
                    '%s has the foreign table %s below it and cannot be watched; remove watch from the dataset',
                    name, foreign_table)
                ELSE format(
                    '%s has the foreign table %s below it, and while %1$s is watched, statements on %1$s that change rows '
                    'of %2$s fail; run: cacheservice unwatch %1$s', name, foreign_table)
            END;
            EXIT;
        END IF;
        IF watch.id IS NULL THEN
            problem := format('%s is not watched; say: %s', name, again);
            EXIT;
        END IF;
        -- A visible row was written by a transaction with a smaller number, unless it came with a dump.
        IF watch.since_xid >= pg_snapshot_xmax(pg_current_snapshot())
           OR (SELECT p.through >= pg_snapshot_xmax(pg_current_snapshot()) FROM cacheservice.pruned AS p) THEN
            problem := 'the records in the schema cacheservice were written by another cluster; '
                       'the service that prunes them resets them within a minute, or say: cacheservice migrate';
            EXIT;
        END IF;
        SELECT count(*) FILTER (WHERE a.attname = ANY (columns) AND a.attgenerated <> 'v') AS stored_keys,
               -- A virtual column's expression can be changed without a change of any row.
               jsonb_agg(concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod, CASE WHEN a.attgenerated <> '' THEN (
                   SELECT pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef AS d
                   WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum) END) ORDER BY a.attnum) AS columns,
               -- Of those that others made, enums alone are fit to be compared as text.
               jsonb_agg((
                   SELECT CASE WHEN t.typtype = 'd' THEN t.typbasetype
                               WHEN t.typtype = 'e' OR t.oid < 16384 THEN t.oid
                               ELSE 0 END::bigint
                   FROM pg_type AS t WHERE t.oid = a.atttypid) ORDER BY array_position(columns, a.attname)
               ) FILTER (WHERE a.attname = ANY (columns)) AS key_types
        INTO attributes FROM pg_attribute AS a
        WHERE a.attrelid = table_oid AND a.attnum > 0 AND NOT a.attisdropped;
        IF attributes.stored_keys < width THEN
            SELECT string_agg(c.name, ', ') INTO missing FROM unnest(columns) AS c (name)
            WHERE NOT EXISTS (
                SELECT FROM pg_attribute AS a
                WHERE a.attrelid = table_oid AND a.attname = c.name AND NOT a.attisdropped AND a.attgenerated <> 'v');
            problem := format('%s has no stored column %s any more; watch it by another key, and say so in the configuration',
                              name, missing);
            EXIT;
        END IF;
        IF NOT has_schema_privilege(owner, 'cacheservice', 'USAGE')
           OR NOT has_table_privilege(owner, 'cacheservice.changes', 'INSERT') THEN
            problem := format('%s, which owns cacheservice.changes, may not write to it, so that nothing is recorded; '
                              'say: cacheservice migrate', pg_get_userbyid(owner));
            EXIT;
        END IF;
        SELECT count(*) FILTER (WHERE t.enabled = 4) AS complete, bool_or(t.misowned) AS misowned,
               string_agg(t.versions, ' ' ORDER BY t.tgrelid) AS versions
        INTO triggers FROM (
            SELECT t.tgrelid, count(*) FILTER (WHERE t.tgenabled = 'A') AS enabled, bool_or(p.proowner <> owner) AS misowned,
                   string_agg(concat(t.xmin, '/', p.xmin), ' ' ORDER BY t.tgname) AS versions
            FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid
            WHERE t.tgrelid = ANY (tree) AND t.tgname LIKE 'cacheservice\_' || watch.id || '\_%'
            GROUP BY t.tgrelid
        ) AS t;
        IF watch.form > 1 AND triggers.misowned THEN
            problem := format('the trigger functions of %s do not belong to %s, which owns cacheservice.changes; '
                              'say again: %s', name, pg_get_userbyid(owner), again);
            EXIT;
        END IF;
        -- A statement fires only the triggers of the table that it names, be it the parent, another parent, or a child.
        IF EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = ANY (tree) AND i.inhparent <> ALL (tree)) THEN
            problem := CASE
                WHEN EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = table_oid)
                THEN format('%s has become a partition or a child of another table; watch that', name)
                ELSE format('a child of %s also inherits from another table, and statements on that table are not '
                            'recorded; remove watch from the dataset', name)
            END;
            EXIT;
        END IF;
        IF triggers.complete < cardinality(tree) THEN
            problem := format('%s or a partition of it lacks a trigger of ours; say again: %s', name, again);
            EXIT;
        END IF;
        IF kind = 'p' THEN
            -- The triggers are shown no row that a MERGE moves to another partition. (`migrate` renews those of form 2.)
            IF watch.form < 3 AND current_setting('server_version_num')::integer >= 150000 THEN
                problem := format('%s was watched by an older version, which misses rows that a MERGE moves to another '
                                  'partition; run again: %s', name, again);
                EXIT;
            END IF;
            -- Nor does the statement that applies a rule show what the rule runs. commandType 5: MERGE, in WITH.
            SELECT min(r.ev_class::regclass::text) INTO merging_rule FROM pg_rewrite AS r
            WHERE r.ev_type <> '1' AND r.ev_action::text LIKE '%:commandType 5%';
            IF merging_rule IS NOT NULL THEN
                problem := format('a rule on %s runs a MERGE, and triggers cannot see rows of %s that it moves to another '
                                  'partition; remove watch from the dataset, or the rule', merging_rule, name);
                EXIT;
            END IF;
        END IF;
        -- A subscription's worker fires no trigger for statements (PostgreSQL manual, 29.7); those for rows it does.
        IF EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = ANY (tree)) AND EXISTS (
            SELECT FROM pg_class AS c WHERE c.oid = ANY (tree) AND c.relkind = 'r' AND NOT EXISTS (
                SELECT FROM pg_trigger AS t
                WHERE t.tgrelid = c.oid AND t.tgenabled IN ('R', 'A') AND t.tgname = format('cacheservice_%s_row', watch.id)
            )
        ) THEN
            problem := format('%s is filled by logical replication and lacks a trigger for that; say again: %s', name, again);
            EXIT;
        END IF;
        watched_ids := watched_ids || watch.id;
        tables := tables || jsonb_build_object(name, jsonb_build_object(
            'watched', watch.id,
            'kind', kind,
            'notifies', watch.notifies,
            'since', watch.since_xid::text,
            'relations', (SELECT jsonb_agg(pg_relation_filenode(t.oid) ORDER BY t.oid) FROM unnest(tree) AS t (oid)),
            'triggers', triggers.versions,
            'columns', attributes.columns,
            'key_types', attributes.key_types
        ));
        IF previous IS NOT NULL AND NOT pg_visible_in_snapshot(watch.since_xid, previous) THEN
            problem := format('%s has been watched only since the last refresh', name);
        END IF;
    END LOOP;
    IF previous IS NOT NULL AND problem IS NULL THEN
        -- How many of the changes are newer than `previous` decides how they are best found.
        PERFORM set_config('plan_cache_mode', 'auto', true);
        SELECT format(
            '%s was truncated, one statement changed more than a million rows or 100 MB of keys, %sor its key was renamed',
            t.key, CASE WHEN t.value ->> 'kind' = 'p' THEN 'a MERGE may have moved rows to another partition, ' ELSE '' END)
        INTO problem FROM jsonb_each(tables) AS t
        WHERE EXISTS (
            SELECT FROM cacheservice.changes AS c
            WHERE c.watched = (t.value ->> 'watched')::integer AND c.keys IS NULL AND c.xid >= pg_snapshot_xmin(previous)
              AND (pg_is_in_recovery() OR NOT pg_visible_in_snapshot(c.xid, previous))
        ) LIMIT 1;
    END IF;
    IF previous IS NOT NULL AND problem IS NULL
       AND (SELECT p.through >= pg_snapshot_xmin(previous) FROM cacheservice.pruned AS p) THEN
        problem := 'the changes since the last refresh are not kept any more';
    END IF;
    state := jsonb_build_object(
        -- As numbers: their text depends on settings.
        'server', extract(epoch FROM pg_postmaster_start_time()) || ' '
                  || coalesce((SELECT extract(epoch FROM b.stats_reset) FROM pg_stat_bgwriter AS b)::text, '')
                  || ' ' || (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database()),
        'kept', concat_ws(
            ' ', (SELECT p.truncations FROM cacheservice.pruned AS p), pg_relation_filenode('cacheservice.changes'),
            (SELECT c.xmin FROM pg_class AS c WHERE c.oid = 'cacheservice.changes'::regclass),
            (SELECT n.xmin FROM pg_namespace AS n WHERE n.nspname = 'cacheservice')),
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
COMMENT ON FUNCTION cacheservice.changes(jsonb, pg_snapshot, integer) IS
    'What was changed in watched tables by transactions that a snapshot does not see, for those who may read them.';
REVOKE ALL ON FUNCTION cacheservice.changes(jsonb, pg_snapshot, integer) FROM PUBLIC;

-- The oldest recorded change: `prune` deletes by xid, and finds the oldest among the first of each watch.
CREATE OR REPLACE FUNCTION cacheservice.oldest_change()
RETURNS TABLE (changed_at timestamptz, xid xid8)
LANGUAGE plpgsql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RETURN QUERY
    SELECT c.changed_at, c.xid
    FROM cacheservice.watched AS w CROSS JOIN LATERAL (
        SELECT f.changed_at, f.xid FROM cacheservice.changes AS f WHERE f.watched = w.id ORDER BY f.xid LIMIT 100
    ) AS c
    ORDER BY c.changed_at LIMIT 1;
END
$$;
COMMENT ON FUNCTION cacheservice.oldest_change() IS 'When the oldest recorded change was made, and by which transaction.';
REVOKE ALL ON FUNCTION cacheservice.oldest_change() FROM PUBLIC;
-- For the readers that there are.
DO $$
DECLARE
    reader regrole;
BEGIN
    FOR reader IN
        SELECT a.grantee FROM pg_proc AS p CROSS JOIN LATERAL aclexplode(p.proacl) AS a
        WHERE p.oid = 'cacheservice.prune(interval, integer)'::regprocedure AND a.grantee NOT IN (0, p.proowner)
    LOOP
        EXECUTE format('GRANT EXECUTE ON FUNCTION cacheservice.oldest_change() TO %s', reader);
    END LOOP;
END
$$;
