"""The HTTP port: serves datasets and rows as JSON, the dashboard, and the probes."""

from cacheservice.ports.http.access import AccessSettings
from cacheservice.ports.http.factory import HttpFactory, Served

__all__ = ["AccessSettings", "HttpFactory", "Served"]
