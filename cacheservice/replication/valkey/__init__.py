"""Valkey, or another server with the Redis protocol, as the carrier between machines."""
