"""``python -m cacheservice``."""

from cacheservice.cli.main import main

main()
