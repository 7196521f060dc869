"""examples/monitoring: metrics for Prometheus, its alerts, and a dashboard, against each other.

What really exports them (Debian: prometheus-postgres-exporter) and what judges alerts (promtool)
run where they are installed.
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
# Of each query, its columns by name, each with how it is used.
COLUMNS = {
    name: {key: each["usage"] for column in query["metrics"] for key, each in column.items()}
    for name, query in QUERIES.items()
}
METRICS = {
    f"{name}_{column}"
    for name, columns in COLUMNS.items()
    for column, usage in columns.items()
    if usage == "GAUGE"
}


@pytest.mark.parametrize("name", QUERIES)
def test_each_query_gives_the_columns_it_says_as_the_monitor(alice, worker, monitor, name):
    query = QUERIES[name]["query"]
    monitor.query(query)  # also in a database nobody uses
    alice.enqueue()
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated", "NSFW")

    rows = monitor.query(query)

    assert rows and set(rows[0]) == set(COLUMNS[name])
    for row in rows:
        for column, usage in COLUMNS[name].items():
            kind = (str, type(None)) if usage == "LABEL" else (int, float, type(None))
            assert isinstance(row[column], kind), column


@pytest.mark.parametrize("name", ["darkroom_queue", "darkroom_alert", "darkroom_model"])
def test_each_query_counts_the_queue_once(db, name):
    session = db.connect()
    session.execute("set track_functions = 'all'")

    session.execute(QUERIES[name]["query"])
    session.close()

    made = (
        "select calls from pg_stat_user_functions"
        " where funcname in ('queue_health', 'report_models')"
    )
    eventually(lambda: db.execute(made) == [{"calls": 1}])


def test_every_alert_of_queue_health_has_its_rule_and_the_other_way_round(db):
    rules = db.execute("select alert, severity from private.alert_rules")

    found = {
        (rule["alert"], rule["expr"], rule.get("labels", {}).get("severity"))
        for rule in RULES
        if rule["alert"] != "DarkroomUnseen"
    }
    assert found == {
        (
            "Darkroom" + rule["alert"].title().replace("_", ""),
            f'darkroom_alert_raised{{alert="{rule["alert"]}"}} == 1',
            rule["severity"],
        )
        for rule in rules
    }
    unseen = [rule["expr"] for rule in RULES if rule["alert"] == "DarkroomUnseen"]
    assert unseen == ["absent(darkroom_alert_raised)"]


def test_rules_and_dashboard_speak_of_metrics_that_are_and_no_label_is_about_users():
    panels = DASHBOARD["panels"]
    expressions = [target["expr"] for panel in panels for target in panel["targets"]]

    for expression in [*expressions, *(rule["expr"] for rule in RULES)]:
        named = set(re.findall(r"\bdarkroom_\w+", expression))
        assert named and named <= METRICS, expression
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in panels)
    labels = {
        column
        for columns in COLUMNS.values()
        for column, usage in columns.items()
        if usage == "LABEL"
    }
    assert labels == {
        *("alert", "severity", "model_id", "provider", "error_code"),
        *("worker_id", "host", "version"),
    }


def test_the_exporter_exports_every_metric(db, alice, worker, tmp_path):
    if not (program := shutil.which("prometheus-postgres-exporter")):
        pytest.skip("prometheus-postgres-exporter is not installed")
    alice.enqueue()
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")
    db.execute("alter role darkroom_monitor password 'looks-on'")
    password = db.url.partition("//")[2].partition("@")[0]
    url = db.url.replace(password, "darkroom_monitor:looks-on") + "?sslmode=disable"
    address, log = f"127.0.0.1:{free_port()}", tmp_path / "exporter" / "log"
    options = (
        "--disable-default-metrics --disable-settings-metrics --no-collector.database"
        f" --no-collector.bgwriter --web.listen-address {address} --extend.query-path"
    )
    command = [program, *options.split(), str(MONITORING / "queries.yaml")]
    process = spawn(command, log=log, cwd=tmp_path, env={"DATA_SOURCE_NAME": url})

    def exported():
        try:
            return httpx.get(f"http://{address}/metrics").text
        except httpx.TransportError:
            return ""

    try:
        process.wait_until(exported, 20, log)
        text = exported()
    finally:
        process.stop(signal.SIGTERM, 10)
    assert set(re.findall(r"^(darkroom_\w+)[ {]", text, re.MULTILINE)) == METRICS
    assert re.search(r'^darkroom_alert_raised\{alert="no_worker",.*\} 0$', text, re.MULTILINE)
    assert re.search(r"^darkroom_queue_ready_jobs\{.*\} 1$", text, re.MULTILINE)
    assert "pg_exporter_last_scrape_error 0" in text


def test_promtool_accepts_the_rules():
    if not (program := shutil.which("promtool")):
        pytest.skip("promtool is not installed")

    subprocess.run([program, "check", "rules", str(MONITORING / "alerts.yaml")], check=True)
