"""Tests that need no socket, no server and no other process: ``python -m pytest tests/unit``.

A module has the name of the one in tests/ that tests the same on real sockets and servers, where there is one.
"""
