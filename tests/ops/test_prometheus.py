"""deploy/prometheus, checked by promtool, Prometheus, and the metrics of a live server."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conftest import HOST, ROOT, SOON, serving, tool, wait_until, wire_to
from dsmq import settings as config
from dsmq.server import Server
from engine import engine

pytestmark = pytest.mark.deploy

HERE = ROOT / "deploy/prometheus"
RULES = (HERE / "rules.yml").read_text()
ALERTS = re.findall(r"^ *- alert: (\w+)$", RULES, re.MULTILINE)
# Prometheus takes five seconds to find its targets.
TARGETS_FOUND = 3 * SOON
# Enables the metrics by topic.
TOPICS = {"metrics_topics": 10}
TOKEN = "a-token-for-the-tests"


def promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [tool("promtool", "prometheus"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=SOON * 3, check=False)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def get(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SOON) as answer:
        return str(answer.read().decode())


def metrics(server: Server) -> str:
    return get(f"http://127.0.0.1:{server.http_port}/metrics")


def series(server: Server) -> set[str]:
    """Return the names of all series that a server exports, including those without samples so far."""
    names = {"up"}  # Prometheus's own
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", metrics(server), re.MULTILINE):
        names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    return names


@contextmanager
def serving_from_engine(folder: Path) -> Iterator[Server]:
    """Run a server with a store in an engine of one node."""
    with engine(folder / "nats", 1) as nodes:
        given = {"port": 0, "http_port": 0, "store": f"nats://{HOST}:{nodes.nodes[0].port}", "store_replicas": 1}
        with Server(config.load(kind=config.EmbeddedSettings, **given)) as server:
            yield server


def of_engine(text: str) -> bool:
    """Return whether a metric or a query is about a store in an engine."""
    return re.search(r"dsmq_(engine|mirror)_|operation=\"publish\"", text) is not None


def make_traffic(server: Server) -> None:
    """Make most counters and gauges non-zero."""
    with wire_to(server) as unknown:
        assert unknown.error("AUTH", "wrong") == "WRONGPASS"
        assert unknown.ended()
    with wire_to(server) as wire, wire_to(server) as unauthenticated:
        assert unauthenticated.call("PING") == "PONG"
        assert wire.error("PUT", "t", "x") == "NOAUTH"
        assert wire.call("AUTH", TOKEN) == "OK"
        assert wire.call("PUT", "t", "x") == 1
        assert wire.call("PUT", "u", "y") == 2
        assert wire.error("PUT", "t", "a second one") == "FULL"
        assert wire.call("GET", "t") == b"x"
        assert wire.call("GET", "t") is None
        assert len(wire.call("TAKE", "u", "workers", "60000")) == 7  # type: ignore[arg-type]
        assert wire.error("FROBNICATE") == "UNKNOWN"
        with wire_to(server) as one_too_many:
            assert one_too_many.receive().code == "BUSY"  # type: ignore[union-attr]


@contextmanager
def busy_server(**settings: object) -> Iterator[Server]:
    """A server after make_traffic."""
    fixed = {"http_port": 0, "auth_token": TOKEN, "max_stored_messages_per_topic": 1, "max_connections": 2}
    with serving(**fixed, **settings) as server:
        make_traffic(server)
        yield server


class Prometheus:
    """A Prometheus on a free port, with the shipped configuration; it scrapes one server each second."""

    def __init__(self, server: Server, folder: Path, config: str) -> None:
        for shipped, ours in (("127.0.0.1:30009", f"127.0.0.1:{server.http_port}"), (": 15s", ": 1s")):
            assert shipped in config
            config = config.replace(shipped, ours)
        (folder / "prometheus.yml").write_text(config)
        (folder / "rules.yml").write_text(RULES)
        self._log = folder / "log"
        command = [
            tool("prometheus", "prometheus"),
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            "--web.listen-address=127.0.0.1:0",
        ]
        with self._log.open("w") as log:
            self.process = subprocess.Popen(command, stderr=log)

    def is_ready(self) -> bool:
        log = self._log.read_text()
        assert self.process.poll() is None, log
        if not (port := re.search(r'"Listening on".* address=127\.0\.0\.1:(\d+)', log)):
            return False
        self.url = f"http://127.0.0.1:{port[1]}"
        try:
            get(f"{self.url}/-/ready")
        except urllib.error.HTTPError:
            return False
        return True

    def api(self, path: str, **parameters: str) -> Any:
        """Return the data of a response, which must be a success."""
        try:
            answer = json.loads(get(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        """Return the current samples of an expression."""
        return list(self.api("query", query=expression)["result"])

    def value(self, expression: str) -> float | None:
        """Return the value of the first sample, if there is one."""
        samples = self.query(expression)
        return float(samples[0]["value"][1]) if samples else None

    def rules(self) -> list[Any]:
        return [rule for group in self.api("rules")["groups"] for rule in group["rules"]]


@contextmanager
def prometheus(server: Server, folder: Path, config: str | None = None) -> Iterator[Prometheus]:
    started = Prometheus(server, folder, config or (HERE / "prometheus.yml").read_text())
    try:
        wait_until(started.is_ready, TARGETS_FOUND)
        yield started
    finally:
        started.process.terminate()
        started.process.wait(SOON)


# Names in PromQL

_STRINGS = re.compile(r'"(?:\\.|[^"\\])*"')
_NO_NAMES = re.compile(
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"  # lists of labels
    r"|\{[^}]*\}|\[[^]]*\]"  # matchers, ranges
    r"|\b(?:bool|and|or|unless|offset|group_left|group_right|by|without)\b"
)


def names(expression: str) -> set[str]:
    """Return the metrics that an expression uses."""
    # Strings first: they may contain any of the others.
    rest = _NO_NAMES.sub(" ", _STRINGS.sub("", expression))
    return set(re.findall(r"(?<![\w:.])[a-zA-Z_:][\w:]*(?![\w:]|\s*\()", rest))


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ("up", {"up"}),
        ('rate(a_total{x=~"b|c}(", y!="z"}[5m]) > 0.8', {"a_total"}),
        ("histogram_quantile(0.99, sum by (le, x) (rate(a_bucket[$__rate_interval])))", {"a_bucket"}),
        ("sum(a) by (x) / on (x) group_left (y) b", {"a", "b"}),
        ("a / ignoring (topic) group_left b_c", {"a", "b_c"}),
        ("(a:b:c >= 0.8) < bool 1e3 and d offset 5m unless e or f", {"a:b:c", "d", "e", "f"}),
        ("time() - start_time_seconds", {"start_time_seconds"}),
    ],
)
def test_metric_names_are_extracted_from_expressions(expression: str, found: set[str]) -> None:
    assert names(expression) == found


# Rules


def test_prometheus_configuration_is_valid() -> None:
    done = promtool("check", "config", str(HERE / "prometheus.yml"))
    assert done.returncode == 0, said(done)


def test_prometheus_rules_are_valid() -> None:
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", str(HERE / "rules.yml"))
    assert done.returncode == 0, said(done)


def test_alerts_fire_when_they_should_and_not_otherwise() -> None:
    done = promtool("test", "rules", str(HERE / "rules_test.yml"))
    assert done.returncode == 0, said(done)


@pytest.mark.parametrize("expression", ["up < 0", "up >= 0 or absent(up)"], ids=["never", "always"])
def test_every_alert_has_a_rule_test(expression: str, tmp_path: Path) -> None:
    """If alerts never fire or always fire, the rule tests must fail for each alert."""
    changed, count = re.subn(
        r"(- alert: \w+\n(?: +#[^\n]*\n)* +expr: ).*?(?=\n +(?:for|labels):)",
        rf"\g<1>{expression}",
        RULES,
        flags=re.DOTALL,
    )
    assert count == len(ALERTS) > 10
    (tmp_path / "rules.yml").write_text(changed)
    (tmp_path / "rules_test.yml").write_text((HERE / "rules_test.yml").read_text())
    done = promtool("test", "rules", str(tmp_path / "rules_test.yml"))
    assert done.returncode == 1
    side = "exp" if expression == "up < 0" else "got"
    failed = "".join(re.findall(rf"^ *{side}: (.*)$", said(done), re.MULTILINE))
    assert set(re.findall(r'alertname="(\w+)"', failed)) == set(ALERTS)


def test_every_alert_has_summary_and_description(tmp_path: Path) -> None:
    with serving(http_port=0) as server, prometheus(server, tmp_path) as watcher:
        alerts = [rule for rule in watcher.rules() if rule["type"] == "alerting"]
        assert sorted(alert["name"] for alert in alerts) == sorted(ALERTS)
        for alert in alerts:
            assert alert["labels"].keys() == {"severity"}
            assert alert["labels"]["severity"] in ("warning", "critical")
            assert alert["annotations"].keys() == {"summary", "description"}
            assert len(alert["annotations"]["summary"]) < 160 < len(alert["annotations"]["description"])


# Metrics


def test_promtool_accepts_metrics() -> None:
    with busy_server(**TOPICS) as server:
        done = promtool("check", "metrics", stdin=metrics(server))
    assert (done.returncode, said(done)) == (0, "")


def test_rules_use_existing_metrics(tmp_path: Path) -> None:
    with serving(http_port=0, **TOPICS) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        with prometheus(server, tmp_path) as watcher:
            rules = watcher.rules()
        found = series(server)
    with serving_from_engine(tmp_path) as server:
        found |= series(server)
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    asked = set().union(*(names(rule["query"]) for rule in rules))
    assert asked - recorded - found == set()
    # Each recorded series is used.
    assert recorded <= asked


def test_other_rules_work_without_metrics_of_topics_and_engine(tmp_path: Path) -> None:
    with serving(http_port=0) as server, prometheus(server, tmp_path) as watcher:
        asked = set().union(*(names(rule["query"]) for rule in watcher.rules()))
        missing = {name for name in asked - series(server) if name.startswith("dsmq_") and not of_engine(name)}
        assert all(name.startswith(("dsmq_topic_", "dsmq_group_")) for name in missing), missing


# Prometheus


def test_prometheus_scrapes_server(tmp_path: Path) -> None:
    with serving(http_port=0) as server, wire_to(server) as wire, prometheus(server, tmp_path) as watcher:
        for number in range(3):
            assert wire.call("PUT", "t", "x") == number + 1
        wait_until(lambda: watcher.value("dsmq_puts_total") == 3, TARGETS_FOUND)
        assert watcher.value("dsmq_messages") == 3
        (target,) = watcher.api("targets")["activeTargets"]
        assert (target["health"], target["lastError"], target["labels"]["job"]) == ("up", "", "dsmq")
        assert watcher.value('up{job="dsmq"}') == 1
        wire.call("PUT", "t", "x")
        wait_until(lambda: watcher.value("dsmq_puts_total") == 4, TARGETS_FOUND)
        # DsmqAbsent pends until the first scrape.
        wait_until(lambda: watcher.api("alerts")["alerts"] == [], TARGETS_FOUND)
        assert {rule["health"] for rule in watcher.rules()} <= {"ok", "unknown"}


def test_prometheus_sends_configured_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    plain = (HERE / "prometheus.yml").read_text()
    config = plain.replace("#authorization:", "authorization:").replace("#  credentials_file:", "  credentials_file:")
    assert config != plain
    config = config.replace("/etc/prometheus/dsmq-http-token", str(tmp_path / "token"))
    with serving(http_port=0, http_token=TOKEN) as server, prometheus(server, tmp_path, config) as watcher:
        wait_until(lambda: watcher.value("up") == 1, TARGETS_FOUND)


def test_missing_token_marks_target_down_and_alerts(tmp_path: Path) -> None:
    with serving(http_port=0, http_token=TOKEN) as server, prometheus(server, tmp_path) as watcher:
        wait_until(lambda: watcher.value("up") == 0, TARGETS_FOUND)
        wait_until(lambda: watcher.query('ALERTS{alertname="DsmqDown", alertstate="pending"}') != [], TARGETS_FOUND)
        alert = next(one for one in watcher.api("alerts")["alerts"] if one["labels"]["alertname"] == "DsmqDown")
        assert f"127.0.0.1:{server.http_port}" in alert["annotations"]["summary"]


def test_full_topic_alert_names_the_topic(tmp_path: Path) -> None:
    with busy_server(**TOPICS) as server, prometheus(server, tmp_path) as watcher:
        wait_until(lambda: len(watcher.query('ALERTS{limit="messages of a topic"}')) == 2, TARGETS_FOUND)
        alerts = [alert for alert in watcher.api("alerts")["alerts"] if alert["labels"].get("topic") == "t"]
        assert [alert["annotations"]["summary"] for alert in alerts] == [
            f"dsmq 127.0.0.1:{server.http_port}: 100% of the limit on messages of a topic (t)"
        ]
        assert "max_stored_messages_per_topic" in alerts[0]["annotations"]["description"]


# The dashboard

DASHBOARD = json.loads((HERE / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]] + [
    annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]
]


def as_asked(query: str) -> str:
    """Return a query as Grafana sends it, with all servers selected."""
    query = query.replace("$instance", ".+").replace("$__rate_interval", "1m")
    assert "$" not in query
    return query


def test_dashboard_uses_existing_metrics(tmp_path: Path) -> None:
    with serving(http_port=0, **TOPICS) as server, wire_to(server) as wire:
        wire.call("PUT", "t", "x")
        found = series(server)
    with serving_from_engine(tmp_path) as server:
        found |= series(server)
    assert set().union(*map(names, QUERIES)) - found == set()


def test_every_dashboard_query_returns_data(tmp_path: Path) -> None:
    """After such traffic, a query without data uses a label or a metric that does not exist."""
    never = {query for query in QUERIES if query.startswith("changes(") or of_engine(query)}

    def without_data() -> set[str]:
        return {query for query in QUERIES if not watcher.query(as_asked(query))}

    snapshots = {"snapshot_file": str(tmp_path / "snapshot"), "snapshot_interval_seconds": 1}
    with busy_server(**TOPICS, **snapshots) as server, prometheus(server, tmp_path) as watcher:
        wait_until(lambda: (watcher.value("count_over_time(up[1m])") or 0) >= 2, TARGETS_FOUND)
        wait_until(lambda: without_data() == never, TARGETS_FOUND)


def test_every_query_of_the_engine_returns_data(tmp_path: Path) -> None:
    queries = list(filter(of_engine, QUERIES))
    assert len(queries) > 5
    with (
        serving_from_engine(tmp_path) as server,
        wire_to(server) as wire,
        prometheus(server, tmp_path) as watcher,
    ):

        def have_data() -> bool:
            assert isinstance(wire.call("PUT", "t", "x"), int)
            return all(watcher.query(as_asked(query)) for query in queries)

        wait_until(have_data, TARGETS_FOUND)
        assert watcher.value("dsmq_engine_connected") == 1


def test_grafana_can_provision_dashboard() -> None:
    assert not [key for key in DASHBOARD if key.startswith("__")]
    assert "id" not in DASHBOARD
    assert DASHBOARD["uid"] == "dsmq"
    variables = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert variables == ["datasource", "instance"]
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    for panel in PANELS:
        assert [panel["datasource"], *(target["datasource"] for target in panel["targets"])] == [chosen] * (
            1 + len(panel["targets"])
        )
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEFGHI"[: len(panel["targets"])])


def test_panels_have_unique_positions_and_titles() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_panels_named_by_alerts_exist() -> None:
    titles = {panel["title"] for panel in PANELS}
    pointed = {
        name
        for text in re.findall(r"\bpanels? (\"[^\"]+\"(?:(?: \([^)]*\))?(?:,| and)\s+\"[^\"]+\")*)", RULES)
        for name in re.findall(r"\"([^\"]+)\"", text)
    }
    assert pointed
    assert pointed <= titles
