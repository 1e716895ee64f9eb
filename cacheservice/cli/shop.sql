-- The demo's shop: what applications read from a cache all day.
CREATE SCHEMA shop;

CREATE TABLE shop.products (
    id integer PRIMARY KEY,
    sku text NOT NULL UNIQUE,
    name text NOT NULL,
    category text NOT NULL,
    stock integer NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT now()
);
INSERT INTO shop.products (id, sku, name, category, stock)
SELECT n,
       'SKU-' || lpad(n::text, 6, '0'),
       (ARRAY['Small', 'Large', 'Folding', 'Silent', 'Solid'])[1 + n % 5] || ' '
           || (ARRAY['lamp', 'chair', 'kettle', 'clock', 'shelf', 'mirror', 'basket'])[1 + n % 7],
       (ARRAY['home', 'office', 'kitchen', 'garden'])[1 + n % 4],
       n % 100
FROM generate_series(1, 20000) AS n;

CREATE TABLE shop.prices (
    product_id integer NOT NULL REFERENCES shop.products,
    currency text NOT NULL,
    amount numeric(10, 2) NOT NULL,
    PRIMARY KEY (product_id, currency)
);
INSERT INTO shop.prices
SELECT p.id, c.currency, round((5 + p.id % 500 + 0.99) * c.rate, 2)
FROM shop.products AS p
CROSS JOIN (VALUES ('EUR', 1.00), ('USD', 1.09), ('GBP', 0.85)) AS c (currency, rate);

CREATE TABLE shop.feature_flags (
    name text PRIMARY KEY,
    enabled boolean NOT NULL,
    rollout_percent integer NOT NULL
);
INSERT INTO shop.feature_flags
SELECT 'flag_' || n, n % 3 = 0, n * 5 % 101 FROM generate_series(1, 40) AS n;

CREATE TABLE shop.customers (id integer PRIMARY KEY, name text NOT NULL);
INSERT INTO shop.customers SELECT n, 'Customer ' || n FROM generate_series(1, 5000) AS n;

CREATE TABLE shop.permissions (
    customer_id integer NOT NULL REFERENCES shop.customers,
    permission text NOT NULL,
    PRIMARY KEY (customer_id, permission)
);
INSERT INTO shop.permissions
SELECT c.id, p.permission
FROM shop.customers AS c
CROSS JOIN (VALUES ('read'), ('order'), ('refund'), ('export')) AS p (permission)
WHERE (c.id + length(p.permission)) % 3 <> 0;

-- The changes of a shop within two seconds.
CREATE FUNCTION shop.breathe() RETURNS void LANGUAGE sql AS $$
    UPDATE shop.products SET stock = (stock + 99) % 100, updated_at = now()
    WHERE id IN (SELECT 1 + (random() * 19999)::integer FROM generate_series(1, 3));
    UPDATE shop.prices SET amount = round(amount * (0.98 + random() * 0.04)::numeric, 2)
    WHERE product_id = 1 + (random() * 19999)::integer;
    -- An application may send its own notification of a change.
    WITH changed AS (
        UPDATE shop.feature_flags SET rollout_percent = (rollout_percent + 1) % 101
        WHERE random() < 0.2 AND name = 'flag_' || (1 + (random() * 39)::integer)
        RETURNING name
    )
    SELECT pg_notify('feature_flags', json_agg(name)::text) FROM changed HAVING count(*) > 0;
$$;

ANALYZE;
