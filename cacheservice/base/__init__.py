"""Interfaces and helpers that every other part may use; imports nothing of ours."""
