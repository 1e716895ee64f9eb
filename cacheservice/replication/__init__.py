"""Carries publishes from one process to others, in frames, over a link."""
