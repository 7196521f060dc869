"""deploy/: what a machine of one's own runs. The images themselves are not started here."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from database import PROJECT, Database
from test_migrate import run

import compose_env
from stack import Cluster, Settings, postgres_program, sign_jwt

DEPLOY = PROJECT / "deploy"
COMPOSE = (DEPLOY / "compose.yaml").read_text()
PORTS = {"rest": 3000, "auth": 9999, "storage": 5000}


def variables(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\w+)=(.*)$", text))


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE)["services"])


def test_the_example_names_what_compose_insists_on():
    wanted = set(re.findall(r"\$\{(\w+):\?", COMPOSE))
    example = variables((DEPLOY / ".env.example").read_text())

    assert wanted == example.keys()
    assert set(re.findall(r"\$\{(\w+)\}", COMPOSE)) <= wanted


def test_nothing_but_the_front_and_postgresql_is_reachable_and_only_from_here(services):
    published = {name: each["ports"] for name, each in services.items() if "ports" in each}

    assert published.keys() == {"db", "front"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert services["rest"]["environment"]["PGRST_DB_SCHEMAS"] == "public"


def test_the_front_has_the_paths_of_a_supabase_project():
    caddy = (DEPLOY / "Caddyfile").read_text()
    found = re.findall(r"handle_path /(\w+)/v1/\* \{\s+reverse_proxy (\w+):(\d+)", caddy)

    assert {(name, int(port)) for path, name, port in found if path == name} == {*PORTS.items()}


def test_secrets_are_made_once_and_fit_each_other(tmp_path: Path, capsys):
    compose_env.main(tmp_path)
    file = tmp_path / ".env"
    first = file.read_text()
    compose_env.main(tmp_path)

    values = variables(first)
    claims = {"iss": "darkroom", "role": "service_role", "exp": compose_env.KEYS_EXPIRE_AT}
    assert file.read_text() == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len({values[name] for name in compose_env.RANDOM}) == len(compose_env.RANDOM)
    assert all(len(values[name]) == 48 for name in compose_env.RANDOM)
    assert values["SERVICE_ROLE_KEY"] == sign_jwt(values["JWT_SECRET"], claims)
    assert "yours to fill in: S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY" in capsys.readouterr().out


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A new cluster as the container has it, with pg_cron, after roles.sh."""
    folder = tmp_path_factory.mktemp("own")
    cluster = Cluster(folder, Settings(folder / "env"), fsync=False)
    cluster.start()
    database = Database(cluster.url(), "postgres")
    host, port = cluster.address().split(":")
    environment = {
        "PATH": f"{postgres_program('psql').parent}:{os.environ['PATH']}",
        "PGHOST": host,
        "PGPORT": port,
        "PGPASSWORD": cluster.settings.secret("POSTGRES_PASSWORD"),
        **{f"{name}_PASSWORD": name for name in ("AUTHENTICATOR", "AUTH_ADMIN", "STORAGE_ADMIN")},
    }
    try:
        subprocess.run([DEPLOY / "roles.sh"], env=environment, check=True)
        yield database
    finally:
        database.close()
        cluster.stop()
        cluster.delete()


def test_migrate_installs_on_a_server_of_ones_own_with_pg_cron(own_server, supabase_db):
    for schema, role in (("auth", "supabase_auth_admin"), ("storage", "supabase_storage_admin")):
        script = f"drop schema {schema}; {supabase_db.dump(f'--schema={schema}')}"
        done = own_server.psql(script=f"{script}; alter schema {schema} owner to {role};")
        assert done.returncode == 0, done.stderr

    shown = run(own_server.url, "n\n")
    done = run(own_server.url, YES="1")

    assert "pg_cron     for this database" in shown.stdout
    assert done.returncode == 0, done.stderr
    assert "notice      Darkroom: no schema realtime here" in done.stdout
    jobs = "select count(*) from cron.job where jobname like 'darkroom%%' and active"
    assert own_server.value(jobs) == 4


def test_no_request_lasts_for_ever_or_fills_the_disk(own_server):
    parts = psycopg.conninfo.conninfo_to_dict(own_server.url)
    login = {"user": "authenticator", "password": "AUTHENTICATOR"}
    limits = ("statement_timeout", "idle_in_transaction_session_timeout", "temp_file_limit")
    with psycopg.connect(**parts | login) as connection:
        shown = [connection.execute(f"show {each}").fetchone() for each in limits]
    roles = own_server.execute(
        "select rolconfig from pg_roles where rolname in ('anon', 'authenticated') order by rolname"
    )

    assert shown == [("1min",), ("15s",), ("256MB",)]
    assert [*roles[0].values(), *roles[1].values()] == [
        ["statement_timeout=3s"],
        ["statement_timeout=8s"],
    ]


def test_postgrests_role_may_become_whom_a_token_may_name_and_nobody_else(own_server):
    roles = own_server.execute(
        "select r.rolname from pg_auth_members as m inner join pg_roles as r on m.roleid = r.oid"
        " where m.member = 'authenticator'::regrole order by 1"
    )
    parts = psycopg.conninfo.conninfo_to_dict(own_server.url)
    login = {"user": "authenticator", "password": "AUTHENTICATOR"}

    names = ["anon", "authenticated", "darkroom_monitor", "service_role"]
    assert [row["rolname"] for row in roles] == names
    with psycopg.connect(**parts | login) as connection:
        connection.execute("set role anon")
