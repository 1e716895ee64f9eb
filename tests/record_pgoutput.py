"""Records what pgoutput sends for a series of changes, by each supported version: ``python -m tests.record_pgoutput``.

The files are in tests/data; tests/unit/test_pgoutput.py lists the keys that the changes concern.
"""

from __future__ import annotations

import json
from functools import partial

from cacheservice.cli.embedded import EmbeddedPostgres
from tests.kit.paths import ROOT
from tests.kit.postgres import query
from tests.kit.versions import DEFAULT_VERSION, VERSIONS, OlderPostgres, running_server

FOLDER = ROOT / "tests" / "data" / "pgoutput"

# A key of 2,100 bytes is stored outside of its row, and fits into an index.
TABLES = """
CREATE TYPE size AS ENUM ('small', 'large');
CREATE TABLE products (id integer PRIMARY KEY, name text, note text);
CREATE TABLE prices (product integer, currency size, amount numeric, PRIMARY KEY (product, currency));
CREATE TABLE codes (id integer NOT NULL, code text NOT NULL UNIQUE, n integer);
ALTER TABLE codes REPLICA IDENTITY USING INDEX codes_code_key;
CREATE TABLE loose (id integer, note text, n integer);
ALTER TABLE loose REPLICA IDENTITY FULL;
ALTER TABLE loose ALTER note SET STORAGE EXTERNAL;
CREATE TABLE far (id text PRIMARY KEY, n integer);
ALTER TABLE far ALTER id SET STORAGE EXTERNAL;
CREATE TABLE parts (id integer PRIMARY KEY, n integer) PARTITION BY RANGE (id);
CREATE TABLE parts_low PARTITION OF parts FOR VALUES FROM (0) TO (100);
CREATE TABLE parts_high PARTITION OF parts FOR VALUES FROM (100) TO (200);
CREATE TABLE other (id integer PRIMARY KEY);
CREATE PUBLICATION cacheservice FOR TABLE products, prices, codes, loose, far, parts, other
    WITH (publish_via_partition_root = true);
SELECT pg_create_logical_replication_slot('recorded', 'pgoutput');
SELECT pg_replication_origin_create('elsewhere');
"""
# Each is a transaction.
CHANGES = (
    "INSERT INTO products SELECT i, 'é' || i FROM generate_series(1, 3) AS i",
    "UPDATE products SET name = NULL WHERE id = 2",
    "UPDATE products SET id = 4 WHERE id = 3",
    "DELETE FROM products WHERE id = 1",
    "INSERT INTO prices VALUES (1, 'small', 9.50), (1, 'large', NULL)",
    "UPDATE prices SET currency = 'large', product = 2 WHERE currency = 'small'",
    "INSERT INTO codes VALUES (1, 'one', 0); UPDATE codes SET n = 1; UPDATE codes SET code = 'two'; DELETE FROM codes",
    "INSERT INTO loose VALUES (7, repeat(md5('x'), 70), 0), (NULL, NULL, 0)",
    "UPDATE loose SET n = 1; UPDATE loose SET id = 8 WHERE id = 7; DELETE FROM loose WHERE id IS NULL",
    "INSERT INTO far VALUES (repeat('k', 2100), 0); UPDATE far SET n = 1; DELETE FROM far",
    "INSERT INTO parts VALUES (1, 0), (101, 0); UPDATE parts SET id = 102 WHERE id = 1; DELETE FROM parts_high",
    "INSERT INTO other VALUES (1)",
    "ALTER TABLE products DROP note, ADD more integer DEFAULT 5; UPDATE products SET more = 6 WHERE id = 2",
    "SAVEPOINT one; INSERT INTO products VALUES (98, 'back'); ROLLBACK TO one; INSERT INTO products VALUES (99, 'it')",
    "INSERT INTO products VALUES (97, 'never'); ROLLBACK; BEGIN",
    "SELECT pg_logical_emit_message(true, 'canary', 'within'), pg_logical_emit_message(false, 'canary', 'outside')",
    "SELECT pg_replication_origin_session_setup('elsewhere'); INSERT INTO other VALUES (2); "
    "SELECT pg_replication_origin_session_reset(); INSERT INTO products VALUES (5, 'origin')",
    "TRUNCATE products, prices, other",
)
RECORDED = (
    "SELECT encode(data, 'hex') FROM pg_logical_slot_peek_binary_changes('recorded', NULL, NULL, "
    "'proto_version', '1', 'publication_names', 'cacheservice', 'messages', 'true')"
)


def main() -> None:
    """Record all versions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for version in (*VERSIONS, DEFAULT_VERSION):
        older = partial(OlderPostgres, version=version)
        with running_server(EmbeddedPostgres if version == DEFAULT_VERSION else older, wal_level="logical") as server:
            server.run_sql(TABLES)
            for change in CHANGES:
                server.run_sql(f"BEGIN; {change}; COMMIT")
            recorded = query(server, "postgres", RECORDED)
        (FOLDER / f"{version}.json").write_text(json.dumps([data for (data,) in recorded], indent=0) + "\n")


if __name__ == "__main__":
    main()
