"""The table that is measured: a million rows of seven columns, about 150 bytes each as JSON."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from cacheservice.cli.embedded import EmbeddedPostgres

QUERY = "SELECT * FROM products"

TABLE = """
CREATE TABLE products (
    id int PRIMARY KEY, sku text, name text, price numeric(10, 2), stock int, category text, updated_at timestamptz
);
INSERT INTO products
SELECT n, 'SKU-' || lpad(n::text, 8, '0'), 'Product number ' || n, (n % 100000) / 100.0, n % 500,
       (ARRAY['garden', 'kitchen', 'office', 'toys'])[n % 4 + 1],
       timestamptz '2026-01-01 00:00:00Z' + n * interval '1 s'
FROM generate_series(1, {rows}) AS n;
VACUUM (ANALYZE, FREEZE) products;
"""


@contextmanager
def own_server(settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[EmbeddedPostgres]:
    """An empty PostgreSQL of our own, with these settings besides."""
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-benchmarks-"))
    server = EmbeddedPostgres(directory, settings={"shared_buffers": "512MB", **settings})
    try:
        server.start()
        yield server
    finally:
        server.stop("immediate")
        shutil.rmtree(directory)


@contextmanager
def server_with_products(rows: int, settings: Mapping[str, str] = MappingProxyType({})) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL of our own whose database `postgres` holds the table, all of it in its buffers."""
    with own_server(settings) as server:
        server.run_sql(TABLE.format(rows=rows))
        document_bytes = float(server.run_sql("SELECT avg(octet_length(row_to_json(p)::text)) FROM products p"))
        print(f"{rows:,} rows, documents of {document_bytes:.0f} bytes on average\n", flush=True)
        yield server
