"""Carries publishes from one process to others."""
