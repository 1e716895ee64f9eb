"""The results of declared SQL queries, hot in memory, with the age of every answer known."""

__version__ = "0.1.0"
