"""Workers: processes that serve the cache of the main process to its clients.

The main process reads the database, and has the facts about the whole service. A worker serves what the main process
publishes, and asks it for the rest over a link.
"""
