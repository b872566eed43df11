"""Dashboards and alert rules ask for what our pages have: by name without Prometheus, and by query on a real one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from served import NOWHERE, REGION, running
from shipped import REGISTRY
from waiting import wait_for

from dagster_prefs.cli.freshness import readings
from dagster_prefs.freshness.levels import Measure
from dagster_prefs.freshness.metrics import METRICS, MetricsServer, render_metrics
from dagster_prefs.freshness.status import Status
from dagster_prefs.platform import Platform
from dagster_prefs.serving import AsyncProfileClient, ClientOptions, ReadCounts, ShopClient
from dagster_prefs.serving.observing import Watched
from dagster_prefs.serving.served_log import FileRows, ServedLog
from dagster_prefs.settings import Settings

INFRA = Path(__file__).parents[2] / "infra"
DASHBOARDS = sorted((INFRA / "grafana").glob("*.json"))
RULES = INFRA / "prometheus" / "rules.yml"
# What Prometheus adds to every series, and its own metric of a scrape.
ADDED = {"job", "instance", "le"}
BOTH = {"prometheus", "promtool"}
needs_prometheus = pytest.mark.skipif(
    any(shutil.which(program) is None for program in BOTH),
    reason="prometheus and promtool are not installed (Debian: apt-get install prometheus)",
)


class Query(NamedTuple):
    """One expression, and where it stands."""

    where: str
    text: str


def panel_queries() -> list[Query]:
    return [
        Query(f"{path.name}: {panel['title']}", target["expr"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
    ]


def variable_queries() -> list[Query]:
    return [
        Query(f"{path.name}: ${variable['name']}", variable["query"]["query"])
        for path in DASHBOARDS
        for variable in json.loads(path.read_text())["templating"]["list"]
        if variable["type"] == "query"
    ]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_queries() -> list[Query]:
    return [Query(rule["alert"], rule["expr"]) for rule in rules()]


@contextmanager
def feature_server(
    client: AsyncProfileClient, shop: ShopClient, counts: ReadCounts, log: ServedLog | None = None
) -> Iterator[Any]:
    with running(client, shop, watched=Watched(counts, log=log)) as caller:
        yield caller


def labels_by_name(*pages: str) -> dict[str, set[str]]:
    """Sample → the names of its labels, of everything that the pages have."""
    found: dict[str, set[str]] = {}
    for page in pages:
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_every_metric_and_label_that_is_asked_for_is_on_our_pages(tmp_path: Path) -> None:
    everything = Measure("stage", "name", "ok", "", 1.0, values={metric.value: 1 for metric in METRICS})
    counts = ReadCounts()
    away = AsyncProfileClient(
        REGISTRY,
        endpoint_url="http://127.0.0.1:1",
        region=REGION,
        options=ClientOptions(max_attempts=1, observer=counts),
    )
    log = ServedLog(FileRows(tmp_path / "served"))
    with feature_server(away, ShopClient(NOWHERE, observer=counts), counts, log) as caller:
        assert caller.get("/v1/profiles/1")[0] == 503
        page = caller.get("/metrics")[1]
    known = labels_by_name(render_metrics(Status(datetime.now(UTC), 0.1, (everything,))), page)
    names = {
        *REGISTRY.topics,
        *REGISTRY.contract.domains,
        *REGISTRY.entities,
        *(topic.relation for topic in REGISTRY.topics.values()),
    }
    queries = [*panel_queries(), *variable_queries(), *rule_queries()]
    wrong = []
    for where, text in queries:
        asked = re.findall(r"\b(prefs_\w+)(?:\{([^}]*)\})?", text)
        if not asked and "up{" not in text:
            wrong.append(f"{where} asks for nothing")
        labels = set()
        for name, matchers in asked:
            if name not in known:
                wrong.append(f"{where}: no page has {name}")
                continue
            labels |= known[name]
            for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', matchers):
                if label not in known[name] | ADDED:
                    wrong.append(f"{where}: {name} has no label {label}")
                if value in names:
                    wrong.append(f"{where}: {value} is a name of one project")
        grouped = {
            name.strip() for found in re.findall(r"\bby \(([^)]*)\)", text) for name in found.split(",")
        }
        wrong += [f"{where}: no label {label}" for label in grouped - labels - ADDED]
    assert wrong == []
    assert len(queries) > 60
    # What a person would miss.
    asked_for = {name for query in queries for name in re.findall(r"\bprefs_\w+", query.text)}
    assert {metric.name for metric in METRICS} - asked_for == {
        "prefs_lag_warn_seconds",
        "prefs_view_waiting",
        "prefs_view_ahead_seconds",
    }


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_a_place_each(path: Path) -> None:
    panels = json.loads(path.read_text())["panels"]
    identifiers = [panel["id"] for panel in panels]
    assert len(identifiers) == len(set(identifiers))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_rule_says_what_it_is_about_and_is_tested() -> None:
    tests = yaml.safe_load((RULES.parent / "rules_test.yml").read_text())["tests"]
    fired = {
        re.search(r'alertname="(\w+)"', sample["labels"])[1]  # type: ignore[index]
        for sample in tests[0]["promql_expr_test"][0]["exp_samples"]
    }
    assert {rule["alert"] for rule in rules()} == fired
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        assert set(rule["annotations"]) == {"summary", "description"}, rule["alert"]


@needs_prometheus
def test_promtool_accepts_the_rules_and_each_fires() -> None:
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr


class Server:
    """A real Prometheus."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **given: str) -> Any:
        query = urllib.parse.urlencode(given)
        with urllib.request.urlopen(f"{self._url}{path}?{query}", timeout=60) as answer:
            return json.loads(answer.read())["data"]

    def ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self._url}/-/ready", timeout=60).close()
        except OSError:
            return False
        return True

    def series(self, text: str) -> list[Any]:
        return list(self.get("/api/v1/query", query=text)["result"])


@contextmanager
def prometheus(folder: Path, port: int, targets: dict[str, int]) -> Iterator[Server]:
    """Prometheus with the shipped configuration, which scrapes these ports by job."""
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    config["rule_files"] = [str(RULES)]
    assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [f"127.0.0.1:{targets[job['job_name']]}"]}]
        job.pop("scrape_timeout", None)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "log").open("wb"),
    )
    try:
        server = Server(port)
        wait_for(lambda: server.ready() or process.poll() is not None)
        assert process.poll() is None, (folder / "log").read_text()
        yield server
    finally:
        process.terminate()
        process.wait()


def all_values(text: str) -> str:
    """A panel's expression as Grafana would send it, with every value of its variables."""
    for variable, value in (("$__rate_interval", "1m"), ("$entity", ".*"), ("$domain", ".*")):
        text = text.replace(variable, value)
    return text


def sides(text: str) -> str:
    """A rule's expression with 0 or 1 for each comparison, so that it has a series whether it fires or not."""
    return re.sub(
        r'"[^"]*"|(>=|<=|==|!=|>|<)(?=\s)', lambda found: f"{found[0]} bool" if found[1] else found[0], text
    )


@needs_prometheus
def test_every_query_finds_a_series_on_a_real_prometheus(
    busy: Any,
    cluster: Any,
    aws_endpoint: str,
    tmp_path: Path,
    free_port: Callable[[], int],
) -> None:
    given: dict[str, Any] = {
        "engine_port": busy.engine.port,
        "engine_database": busy.engine.database,
        "engine_user": busy.engine.user,
        "aws_endpoint_url": aws_endpoint,
        "iceberg_warehouse": busy.warehouse.as_uri(),
        "data_dir": tmp_path,
    }
    stop = threading.Event()
    following = threading.Thread(target=Platform(Settings(**given)).follower().run, args=[stop])
    following.start()
    try:
        with readings(Settings(**given, kafka_bootstrap=cluster.bootstrap)) as read:
            needed = (
                "prefs_canary_p99_seconds{",
                "prefs_follower_step_age_seconds{",
                "prefs_online_sampled{",
            )
            status = wait_for(
                lambda: (found := read()) and all(name in render_metrics(found) for name in needed) and found
            )
        # What drifts is measured in tests/values; it takes weeks of days.
        usual = Measure("drift", "topic", "ok", "", values={"psi": 0.01, "ks": 0.02, "attributes_drifted": 0})
        # Nothing is behind, and no history is read.
        behind = {"parts": 2, "parts_done": 1, "catch_up_rate": 9.0, "catch_up_seconds_left": 1.0}
        history = Measure("history", "topic from files", "catching up", "", values=behind)
        lake = Measure("offline", "raw_topic", "ok", "", values={"events_unexported": 0})
        status = replace(status, measures=(*status.measures, usual, history, lake))
        counts = ReadCounts()
        client = AsyncProfileClient(
            REGISTRY,
            endpoint_url=aws_endpoint,
            region=REGION,
            options=ClientOptions(30, read_timeout_seconds=30, observer=counts),
        )
        domain = REGISTRY.contract.domains_of("viewer")[0]
        damaged: dict[str, Any] = {name: {"S": "damaged"} for name in domain.attributes}
        busy.client.put_item(
            TableName=busy.table.name,
            Item={**damaged, "viewer_id": {"N": "7"}, "domain_key": {"S": domain.key}},
        )
        with (
            feature_server(client, ShopClient(busy.engine, observer=counts), counts) as caller,
            MetricsServer(lambda: status, port=0) as page,
        ):
            serving = threading.Thread(target=page.serve_forever, kwargs={"poll_interval": 0.01})
            serving.start()
            caller.ready()
            asked = {
                f"/v1/profiles/7?domains={domain.name}": 500,
                "/v1/profiles/7": 200,
                "/v1/profiles/1": 200,
                "/v1/profiles/999999": 200,
                "/v1/users/u1/ranking": 200,
                "/v1/users/nobody/profile": 200,
            }
            assert {path: caller.get(path)[0] for path in asked} == asked
            ports = {"prefs-metrics": page.server_port, "prefs-server": caller.port}
            (tmp_path / "prometheus").mkdir()
            with prometheus(tmp_path / "prometheus", free_port(), ports) as server:
                wait_for(lambda: len(server.series("count_over_time(up[1m]) >= 3 and up == 1")) == 2)
                nothing = [
                    query.where
                    for query in [
                        *(Query(where, all_values(text)) for where, text in panel_queries()),
                        *(Query(where, sides(text)) for where, text in rule_queries()),
                    ]
                    if not server.series(query.text)
                ]
                assert nothing == []
                evaluated = [
                    rule for group in server.get("/api/v1/rules")["groups"] for rule in group["rules"]
                ]
                assert {rule["name"] for rule in evaluated} == {rule["alert"] for rule in rules()}
                assert [rule["lastError"] for rule in evaluated if rule["health"] == "err"] == []
            page.shutdown()
            serving.join()
    finally:
        stop.set()
        following.join()
