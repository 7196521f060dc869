"""examples/monitoring: metrics for Prometheus, its alerts, and a dashboard, against each other. And
whether a browser runs the operator page.
"""

import base64
import hashlib
import json
import re

import pytest
import yaml
from database import PROJECT

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


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_operator_page_allows_its_own_script_and_style(tag):
    text = (PROJECT / "examples" / "operator" / "index.html").read_text()
    (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)

    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()

    assert f"{tag}-src 'sha256-{digest}'" in text, f"put sha256-{digest} into {tag}-src"
