"""The HTTP port: serves datasets and rows as JSON, and the probes."""

from cacheservice.ports.http.channel import HttpFactory

__all__ = ["HttpFactory"]
