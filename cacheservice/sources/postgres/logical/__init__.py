"""Change capture by logical decoding: the keys of changed rows, read from the write-ahead log."""
