"""deploy/: what a machine of one's own runs. The images themselves are not started here."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import yaml
from database import PROJECT, Database
from test_migrate import run

import compose_env
from stack import Cluster, Settings, postgres_program, sign_jwt

DEPLOY = PROJECT / "deploy"
COMPOSE = (DEPLOY / "compose.yaml").read_text()
SERVICES = dict(yaml.safe_load(COMPOSE)["services"])


def variables(text: str) -> dict[str, str]:
    return dict(re.findall(r"(?m)^(\w+)=(.*)$", text))


def test_only_the_front_and_postgresql_are_reachable_from_here_and_all_have_few_rights():
    published = {name: each["ports"] for name, each in SERVICES.items() if "ports" in each}

    assert published.keys() == {"db", "front"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    assert SERVICES["rest"]["environment"]["PGRST_DB_SCHEMAS"] == "public"
    for service in SERVICES.values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["mem_limit"] and service["pids_limit"]
    assert {name for name, each in SERVICES.items() if not each.get("read_only")} == {"db"}
    caddy = (DEPLOY / "Caddyfile").read_text()
    sizes = dict(re.findall(r"handle_path /(\w+)/.*?max_size (\w+)", caddy, re.DOTALL))
    limit = SERVICES["storage"]["environment"]["FILE_SIZE_LIMIT"]
    assert sizes == {"rest": "1MB", "auth": "1MB", "storage": limit}


def test_secrets_are_made_once_fit_each_other_and_are_their_owners_alone(tmp_path: Path, capsys):
    file = tmp_path / ".env"
    file.write_text((DEPLOY / ".env.example").read_text())
    file.chmod(0o644)
    compose_env.main(tmp_path)
    first = file.read_text()
    compose_env.main(tmp_path)

    values = variables(first)
    claims = {"iss": "darkroom", "role": "service_role", "exp": compose_env.KEYS_EXPIRE_AT}
    assert file.read_text() == first
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert values.keys() == set(re.findall(r"\$\{(\w+):\?", COMPOSE))  # what compose insists on
    assert len({values[name] for name in compose_env.RANDOM}) == len(compose_env.RANDOM)
    assert all(len(values[name]) == 48 for name in compose_env.RANDOM)
    assert values["SERVICE_ROLE_KEY"] == sign_jwt(values["JWT_SECRET"], claims)
    assert "yours to fill in: S3_ACCESS_KEY_ID, S3_SECRET_ACCESS_KEY" in capsys.readouterr().out


# --- a server of one's own ---


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


def login(server: Database, role: str) -> psycopg.Connection:
    parts = psycopg.conninfo.conninfo_to_dict(server.url)
    password = role.removeprefix("supabase_").upper()
    return psycopg.connect(**parts | {"user": role, "password": password}, autocommit=True)


def test_the_logins_can_do_what_they_must_also_once_darkroom_is_installed(own_server, supabase_db):
    with login(own_server, "supabase_storage_admin") as connection:
        connection.execute("create table storage.later (id integer)")
        may = "select has_table_privilege('authenticated', 'storage.later', 'insert')"
        assert connection.execute(may).fetchone() == (True,)
        connection.execute("set role authenticated")
    for schema, role in (("auth", "supabase_auth_admin"), ("storage", "supabase_storage_admin")):
        script = f"drop schema {schema} cascade; {supabase_db.dump(f'--schema={schema}')}"
        done = own_server.psql(script=f"{script}; alter schema {schema} owner to {role};")
        assert done.returncode == 0, done.stderr

    shown = run(own_server.url, "n\n")
    done = run(own_server.url, YES="1")

    assert "pg_cron     for this database" in shown.stdout
    assert done.returncode == 0, done.stderr
    assert "notice      Darkroom: no schema realtime here" in done.stdout
    jobs = "select count(*) from cron.job where jobname like 'darkroom%%' and active"
    assert own_server.value(jobs) == 5
    limits = ("statement_timeout", "idle_in_transaction_session_timeout", "temp_file_limit")
    with login(own_server, "authenticator") as connection:
        assert [connection.execute(f"show {each}").fetchone() for each in limits] == [
            ("1min",),
            ("15s",),
            ("256MB",),
        ]
        connection.execute("set role anon")
    timeouts = "select array_agg(rolconfig::text order by rolname) from pg_roles where rolname in"
    assert own_server.value(f"{timeouts} ('anon', 'authenticated')") == [
        "{statement_timeout=3s}",
        "{statement_timeout=8s}",
    ]
    members = "select array_agg(roleid::regrole::text order by 1) from pg_auth_members where member"
    names = ["anon", "authenticated", "darkroom_monitor", "service_role"]
    assert sorted(own_server.value(f"{members} = 'authenticator'::regrole")) == names


@pytest.mark.parametrize("role", ["supabase_auth_admin", "supabase_storage_admin", "authenticator"])
def test_nobody_elses_password_is_a_shell_on_the_database_host(own_server, role):
    with login(own_server, role) as connection:
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
