-- "cacheservice unwatch" first: a trigger that is left would fail.
DROP FUNCTION cacheservice.prune(interval, integer);
DROP FUNCTION cacheservice.changes(jsonb, pg_snapshot, integer);
DROP TABLE cacheservice.pruned, cacheservice.changes, cacheservice.watched;
DELETE FROM cacheservice._yoyo_migration WHERE migration_id = '0002_changes';
