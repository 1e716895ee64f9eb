"""Serves the results of declared SQL queries from memory, with their age."""

__version__ = "0.1.0"
