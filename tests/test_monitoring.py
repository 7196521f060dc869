"""examples/monitoring: metrics for Prometheus, its alerts, and a dashboard, against each other.

Prometheus and its exporter really run where they are installed (Debian: prometheus and
prometheus-postgres-exporter); elsewhere those tests are skipped.
"""

import json
import re
import shutil
import signal
import subprocess

import httpx
import pytest
import yaml
from database import PROJECT
from worker_process import eventually

from processes import free_port, spawn

MONITORING = PROJECT / "examples" / "monitoring"
QUERIES = yaml.safe_load((MONITORING / "queries.yaml").read_text())
RULES = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
UNSEEN = "DarkroomUnseen"
NO_OTHERS = "--disable-default-metrics --disable-settings-metrics"
NO_COLLECTORS = "--no-collector.database --no-collector.bgwriter --web.listen-address"


def columns(query):
    """Return the columns of a query by name, each with how it is used."""
    return {name: column["usage"] for each in query["metrics"] for name, column in each.items()}


def metrics():
    """Return the names of all metrics."""
    return {
        f"{name}_{column}"
        for name, query in QUERIES.items()
        for column, usage in columns(query).items()
        if usage == "GAUGE"
    }


def metrics_in(expression):
    return set(re.findall(r"\bdarkroom_\w+", expression))


@pytest.fixture
def busy(db, alice, worker):
    """A database in which each query has something to say."""
    alice.enqueue()
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated", "NSFW")
    return db


@pytest.mark.parametrize("name", QUERIES)
def test_each_query_gives_the_columns_it_says_as_the_monitor(busy, monitor, name):
    rows = monitor.query(QUERIES[name]["query"])

    assert rows and set(rows[0]) == set(columns(QUERIES[name]))
    for row in rows:
        for column, usage in columns(QUERIES[name]).items():
            kind = (str, type(None)) if usage == "LABEL" else (int, float, type(None))
            assert isinstance(row[column], kind), column


@pytest.mark.parametrize("name", ["darkroom_queue", "darkroom_alert", "darkroom_model"])
def test_each_query_counts_the_queue_once(db, name):
    session = db.connect()
    session.execute("set track_functions = 'all'")

    session.execute(QUERIES[name]["query"])
    session.close()

    counts = ("queue_health", "queue_report")
    made = "select calls from pg_stat_user_functions where funcname = any(%s)"
    eventually(lambda: db.execute(made, list(counts)) == [{"calls": 1}])


@pytest.mark.parametrize("name", QUERIES)
def test_each_query_runs_in_a_database_nobody_uses(monitor, name):
    monitor.query(QUERIES[name]["query"])


def test_every_alert_of_queue_health_has_its_rule_and_the_other_way_round(db):
    rules = db.execute("select alert, severity from private.alert_rules")

    ours = {
        re.fullmatch(r'darkroom_alert_raised\{alert="(\w+)"\} == 1', rule["expr"])[1]: rule
        for rule in RULES
        if rule["alert"] != UNSEEN
    }
    assert {name: rule["labels"]["severity"] for name, rule in ours.items()} == {
        rule["alert"]: rule["severity"] for rule in rules
    }
    for name, rule in ours.items():
        assert rule["alert"] == "Darkroom" + name.title().replace("_", "")
    assert [rule["expr"] for rule in RULES if rule["alert"] == UNSEEN] == [
        "absent(darkroom_alert_raised)"
    ]


def test_rules_and_dashboard_speak_of_metrics_that_are():
    panels = DASHBOARD["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]

    for expression in [*expressions, *(rule["expr"] for rule in RULES)]:
        assert metrics_in(expression) and metrics_in(expression) <= metrics(), expression
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)


def test_no_label_of_a_metric_is_about_users():
    labels = {
        column
        for query in QUERIES.values()
        for column, usage in columns(query).items()
        if usage == "LABEL"
    }

    assert labels == {
        *("alert", "severity", "model_id", "provider", "error_code"),
        *("worker_id", "host", "version"),
    }


def program(name):
    """Return where a program is; skip where it is not installed."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")


@pytest.fixture
def exporter(busy, tmp_path):
    """The exporter as darkroom_monitor; the value is its address."""
    command = [program("prometheus-postgres-exporter"), *NO_OTHERS.split(), *NO_COLLECTORS.split()]
    busy.execute("alter role darkroom_monitor password 'looks-on'")
    address = f"127.0.0.1:{free_port()}"
    password = busy.url.partition("//")[2].partition("@")[0]
    url = busy.url.replace(password, "darkroom_monitor:looks-on") + "?sslmode=disable"
    process = spawn(
        [*command, address, "--extend.query-path", str(MONITORING / "queries.yaml")],
        log=tmp_path / "exporter" / "log",
        cwd=tmp_path,
        env={"DATA_SOURCE_NAME": url},
    )
    process.wait_until(lambda: answers(f"http://{address}/"), 20, tmp_path / "exporter" / "log")
    yield address
    process.stop(signal.SIGTERM, 10)


def answers(url):
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def test_the_exporter_exports_every_metric(exporter):
    text = httpx.get(f"http://{exporter}/metrics").text

    exported = set(re.findall(r"^(darkroom_\w+)[ {]", text, re.MULTILINE))
    assert exported == metrics()
    assert re.search(r'^darkroom_alert_raised\{alert="no_worker",.*\} 0$', text, re.MULTILINE)
    assert re.search(r"^darkroom_queue_ready_jobs\{.*\} 1$", text, re.MULTILINE)
    assert "pg_exporter_last_scrape_error 0" in text


def test_prometheus_scrapes_it_and_its_alerts_follow(exporter, busy, tmp_path):
    """Scrapes once a second for real; some 5 s."""
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [{"job_name": "darkroom", "static_configs": [{"targets": [exporter]}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    options = {"config.file": "prometheus.yml", "storage.tsdb.path": "data"}
    process = spawn(
        [
            *(program("prometheus"), f"--web.listen-address={address}"),
            *(f"--{name}={tmp_path / value}" for name, value in options.items()),
        ],
        log=tmp_path / "prometheus" / "log",
        cwd=tmp_path,
    )
    busy.execute("delete from private.workers")  # with one job still queued

    def asked(query):
        command = [program("promtool"), "query", "instant", f"http://{address}", query]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    try:
        eventually(lambda: asked('darkroom_alert_raised{alert="no_worker"} == 1'), within=30)
        eventually(lambda: 'alertstate="pending"' in asked('ALERTS{alertname="DarkroomNoWorker"}'))
    finally:
        process.stop(signal.SIGTERM, 10)


def test_promtool_accepts_the_rules_and_they_fire_in_time(tmp_path):
    promtool = program("promtool")
    series = 'darkroom_alert_raised{alert="stuck",severity="critical"}'
    test = {
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": series, "values": "0 0 1 1 1 1 0 0"}],
                "promql_expr_test": [
                    {
                        "expr": f'count(ALERTS{{alertname="DarkroomStuck",alertstate="{state}"}})',
                        "eval_time": time,
                        "exp_samples": [{"labels": "{}", "value": 1}],
                    }
                    for time, state in (("2m", "pending"), ("4m", "firing"))
                ],
                "alert_rule_test": [
                    {"alertname": "DarkroomStuck", "eval_time": "7m", "exp_alerts": []}
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))

    for command in (
        ["check", "rules", str(MONITORING / "alerts.yaml")],
        ["test", "rules", "test.yml"],
    ):
        done = subprocess.run(
            [promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
