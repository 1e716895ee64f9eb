"""Composes the parts of the service. `tac/cacheservice.tac` imports it."""

from cacheservice.app.service import load_settings, load_settings_or_exit, make_log, make_service

__all__ = ["load_settings", "load_settings_or_exit", "make_log", "make_service"]
