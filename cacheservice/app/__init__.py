"""Composes the parts of the service. `tac/cacheservice.tac` imports it."""

from cacheservice.app.service import make_service
from cacheservice.app.start import load_settings, load_settings_or_exit, make_log

__all__ = ["load_settings", "load_settings_or_exit", "make_log", "make_service"]
