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


def test_the_front_takes_no_larger_request_than_what_is_behind_it_needs(services):
    caddy = (DEPLOY / "Caddyfile").read_text()
    sizes = dict(re.findall(r"handle_path /(\w+)/.*?max_size (\w+)", caddy, re.DOTALL))

    limit = services["storage"]["environment"]["FILE_SIZE_LIMIT"]
    assert sizes == {"rest": "1MB", "auth": "1MB", "storage": limit}


def test_every_container_is_of_one_release_and_has_limits_and_few_rights(services):
    base = re.search(r"ARG BASE=(.*)", (DEPLOY / "postgres.Dockerfile").read_text())
    assert base
    images = [each["image"] for name, each in services.items() if name != "db"] + [base[1]]
    assert [each for each in images if not re.search(r":v?\d+\.\d+(\.\d+|-\w+)", each)] == []
    for service in services.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"] and service["pids_limit"]
    assert {name for name, each in services.items() if not each.get("read_only")} == {"db"}


def test_the_file_of_secrets_is_its_owners_also_if_it_was_there_already(tmp_path: Path):
    file = tmp_path / ".env"
    file.write_text((DEPLOY / ".env.example").read_text())
    file.chmod(0o644)

    compose_env.main(tmp_path)

    assert stat.S_IMODE(file.stat().st_mode) == 0o600


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


def test_storage_makes_its_tables_without_making_roles_and_the_api_roles_reach_them(own_server):
    parts = psycopg.conninfo.conninfo_to_dict(own_server.url)
    login = {"user": "supabase_storage_admin", "password": "STORAGE_ADMIN"}
    with psycopg.connect(**parts | login, autocommit=True) as connection:
        connection.execute("create table storage.later (id integer)")
        may = "select has_table_privilege('authenticated', 'storage.later', 'insert')"
        assert connection.execute(may).fetchone() == (True,)
        connection.execute("drop table storage.later")
        connection.execute("set role authenticated")


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


@pytest.mark.parametrize("role", ["supabase_auth_admin", "supabase_storage_admin", "authenticator"])
def test_nobody_elses_password_is_a_shell_on_the_database_host(own_server, role):
    passwords = {"supabase_auth_admin": "AUTH_ADMIN", "supabase_storage_admin": "STORAGE_ADMIN"}
    login = {"user": role, "password": passwords.get(role, "AUTHENTICATOR")}
    parts = psycopg.conninfo.conninfo_to_dict(own_server.url)

    with psycopg.connect(**parts | login, autocommit=True) as connection:
        for attack in (
            f"grant pg_execute_server_program to {role}",
            f"grant pg_read_server_files to {role}",
            f"grant postgres to {role}",
            "create role more login superuser",
            "create role more login createrole",
            "alter role postgres password 'mine'",
            "copy (select 1) to program 'id'",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(attack)
