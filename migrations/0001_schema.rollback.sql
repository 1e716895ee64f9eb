DROP FUNCTION cacheservice.blocking_sessions(integer);
DELETE FROM cacheservice._yoyo_migration WHERE migration_id = '0001_schema';
