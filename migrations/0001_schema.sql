-- What the service brings into a database: a schema of its own, and in it what a reader with few rights may ask.
-- (The schema exists by now, because the bookkeeping of the migrations lies in it too.)

COMMENT ON SCHEMA cacheservice IS
    'What cacheservice needs in this database, and the bookkeeping of its migrations.';

-- A role without pg_read_all_stats sees of other sessions only that they exist. This tells it of those, and only of
-- those, that keep another session waiting for a lock: who, since when, and the kind of statement, never its text.
CREATE FUNCTION cacheservice.blocking_sessions(waiting_pid integer)
RETURNS TABLE (
    pid integer,
    user_name name,
    application_name text,
    lock_mode text,
    relation text,
    transaction_since timestamptz,
    state text,
    statement_kind text
)
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
AS $$
    SELECT b.pid,
           a.usename,
           a.application_name,
           l.mode,
           l.relation::regclass::text,
           a.xact_start,
           a.state,
           -- The first word, comments before it left out; for DDL the second one as well.
           upper(array_to_string(regexp_match(
               a.query,
               '^(?:\s|--[^\n]*\n|/\*.*?\*/)*((?:create|alter|drop|lock|truncate|refresh|reindex)\s+[[:alpha:]]+|[[:alpha:]]+)',
               'i'), ''))
    FROM unnest(pg_blocking_pids(waiting_pid)) AS b (pid)
    LEFT JOIN pg_stat_activity AS a ON a.pid = b.pid
    LEFT JOIN LATERAL (
        SELECT held.mode, held.relation
        FROM pg_locks AS waiting
        JOIN pg_locks AS held
          ON held.granted
         AND held.pid = b.pid
         AND held.locktype = waiting.locktype
         AND held.database IS NOT DISTINCT FROM waiting.database
         AND held.relation IS NOT DISTINCT FROM waiting.relation
        WHERE waiting.pid = waiting_pid
          AND NOT waiting.granted
        -- The strongest mode that a session holds is the one that blocks.
        ORDER BY held.mode = 'AccessExclusiveLock' DESC
        LIMIT 1
    ) AS l ON true
$$;

COMMENT ON FUNCTION cacheservice.blocking_sessions(integer) IS
    'The sessions that keep the given server process waiting for a lock; shows no statement''s text.';

-- Only roles made by "cacheservice migrate --reader" may call it.
REVOKE ALL ON FUNCTION cacheservice.blocking_sessions(integer) FROM PUBLIC;
