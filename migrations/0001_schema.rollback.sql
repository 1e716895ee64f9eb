DROP FUNCTION cacheservice.blocking_sessions(integer);
