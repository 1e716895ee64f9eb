"""Runs it: see the package."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import jepsen
from benchmarks.jepsen.cluster import Cluster
from benchmarks.jepsen.faults import Faults
from benchmarks.jepsen.judge import Judge
from benchmarks.jepsen.money import HTTP_LIMIT_S, START_LIMIT_S, WATCHED, WRITERS
from benchmarks.jepsen.service import Service
from benchmarks.jepsen.workers import Beat, HttpReader, RespReader, Worker, Writer
from benchmarks.service import ROOT


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    judge, seed = Judge(), str(options.seed)
    cluster = Cluster(directory, judge)
    services: list[Service] = []
    workers: list[Worker] = []
    began_at = time.monotonic()
    try:
        prepare(cluster)
        cluster.add_standby()
        main = Service("main", directory, cluster.dsn("primary"))
        replica = Service("replica", directory, cluster.dsn("prefer-standby"))
        services = [main, replica]
        for service in services:
            service.start()
        limit = time.monotonic() + START_LIMIT_S
        while not all(service.fresh() for service in services):
            if time.monotonic() > limit:
                raise RuntimeError("\n".join(["no first load:", *(service.ask("status") for service in services)]))
            time.sleep(0.1)
        workers = [Beat(cluster, judge)]
        workers += [Writer(number, cluster, main, judge, seed) for number in range(WRITERS)]
        for service in services:
            workers += [RespReader(number, service, judge, seed) for number in range(2)]
            workers += [HttpReader(0, service, judge, seed)]
        for worker in workers:
            worker.start()
        faults = Faults(cluster, services, judge, seed)
        try:
            if options.strike:
                for name in options.strike:
                    faults.strike(name)
            else:
                faults.run_until(began_at + options.minutes * 60)
        except Exception:
            judge.found("mistakes of the program", traceback.format_exc())
        stop(workers)
        judge.judge_ages()
        return report(judge, faults, options, time.monotonic() - began_at)
    finally:
        stop(workers)
        for service in services:
            service.stop()
        cluster.stop()
        if options.keep is not None:
            for service in services:
                shutil.copy(service.directory / "log", f"{options.keep}.{service.name}.log")


def prepare(cluster: Cluster) -> None:
    environment = {**os.environ, "CACHESERVICE_MIGRATE_DSN": cluster.primary.dsn("bank")}
    program = [sys.executable, "-m", "cacheservice"]
    subprocess.run([*program, "migrate"], check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    for table in WATCHED:
        command = [*program, "watch", f"public.{table}", "--key", "id"]
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)


def stop(workers: Iterable[Worker]) -> None:
    for worker in workers:
        worker.stopped.set()
    for worker in workers:
        if worker.is_alive():
            worker.join(HTTP_LIMIT_S)


def report(judge: Judge, faults: Faults, options: argparse.Namespace, took_s: float) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "minutes": round(took_s / 60, 1),
        "passed": not judge.wrong,
        "wrong": judge.wrong,
        "differences_of_sums": dict(sorted(judge.sums.items())),
        "counts": dict(sorted(judge.counts.items())),
        "faults": dict(sorted(faults.struck.items())),
        "longest_until_fresh_s": {name: round(longest_s, 1) for name, longest_s in sorted(faults.longest_s.items())},
        "beats_lost_at_promotions": len(judge.lost),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=jepsen.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--strike", nargs="+", metavar="FAULT", help="these, once each and in this order, instead")
    parser.add_argument("--report", type=Path, help="a JSON file to write")
    parser.add_argument("--keep", type=Path, help="copy the services' logs to files that begin so")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # and stop what was started
    directory = Path(tempfile.mkdtemp(prefix="cacheservice-jepsen-"))
    directory.chmod(0o755)
    try:
        result = run(options, directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    text = json.dumps(result, indent=2)
    print(text)
    if options.report is not None:
        options.report.write_text(text + "\n")
    sys.exit(0 if result["passed"] else 1)


if __name__ == "__main__":
    main()
