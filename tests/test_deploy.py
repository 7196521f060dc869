"""deploy/: what a machine of one's own runs. The images themselves are not started here."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
import yaml
from database import PROJECT, Database
from test_migrate import run
from worker_process import WorkerProcess

import compose_env
import worker
from stack import Cluster, Settings, postgres_program, sign_jwt

DEPLOY = PROJECT / "deploy"
COMPOSE = (DEPLOY / "compose.yaml").read_text()
SERVICES = dict(yaml.safe_load(COMPOSE)["services"])
WELL = {"SUPABASE_URL": "http://front:8000", "SUPABASE_SERVICE_KEY": "key"}
LOGINS = ("AUTHENTICATOR", "AUTH_ADMIN", "STORAGE_ADMIN", "WORKER")


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


def test_a_file_of_an_earlier_release_gets_what_is_new_and_keeps_the_rest(tmp_path: Path):
    file = tmp_path / ".env"
    file.write_text("JWT_SECRET=mine\nOWN=1\n")

    compose_env.main(tmp_path)

    assert file.read_text().startswith("JWT_SECRET=mine\nOWN=1\n")
    assert len(variables(file.read_text())["WORKER_PASSWORD"]) == 48


# --- the worker's container ---


def test_the_image_takes_its_program_and_nothing_else_of_the_checkout():
    dockerfile = (DEPLOY / "worker.Dockerfile").read_text()
    ignored, *allowed = re.findall(r"(?m)^[^#\n].*$", (PROJECT / ".dockerignore").read_text())
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", dockerfile)

    named = {f"!{file}" for files in copied for file in files.split()}
    assert (ignored, {*allowed}) == ("*", named | {"!deploy/worker.Dockerfile"})
    assert "--require-hashes" in dockerfile
    assert re.search(r"(?m)^USER [1-9]\d*:", dockerfile)
    assert re.search(r"(?m)^ARG BASE=python:\d+\.\d+\.\d+-", dockerfile)
    assert not re.search(r"(?m)^(ARG|ENV) \w*(KEY|TOKEN|PASSWORD|SECRET|URL)", dockerfile)


def test_the_worker_has_room_for_its_pictures_and_time_for_its_jobs():
    service = SERVICES["worker"]
    settings = worker.Settings({"DATABASE_URL": "postgresql://db"} | WELL)
    unit = (PROJECT / "worker.service").read_text()

    room = int(re.search(r"size=(\d+)m", service["tmpfs"][0])[1]) << 20
    assert room >= settings.slots * settings.max_image_bytes
    assert int(service["mem_limit"].removesuffix("m")) << 20 >= (1 << 30) + room
    assert "\nMemoryMax=1G\n" in unit
    grace = int(service["stop_grace_period"].removesuffix("s"))
    assert grace > settings.grace_seconds + 10
    fly = tomllib.loads((DEPLOY / "fly.toml").read_text())
    assert (fly["kill_signal"], fly["kill_timeout"]) == ("SIGTERM", grace)
    assert "http_service" not in fly and "services" not in fly  # else it is stopped when idle
    assert (DEPLOY / fly["build"]["dockerfile"]).exists()


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
        **{f"{name}_PASSWORD": name for name in LOGINS},
    }
    try:
        subprocess.run([DEPLOY / "roles.sh"], env=environment, check=True)
        yield database
    finally:
        database.close()
        cluster.stop()
        cluster.delete()


def address(server: Database, role: str) -> str:
    password = re.sub("^(supabase|darkroom)_", "", role).upper()
    at = urlsplit(server.url)
    return at._replace(netloc=f"{role}:{password}@{at.netloc.rpartition('@')[2]}").geturl()


def login(server: Database, role: str) -> psycopg.Connection:
    return psycopg.connect(address(server, role), autocommit=True)


@pytest.fixture
def early(own_server: Database, tmp_path: Path) -> Iterator[WorkerProcess]:
    """A worker that is started with the rest, before the migration."""
    settings = WELL | {"DATABASE_URL": address(own_server, "darkroom_worker")}
    process = WorkerProcess(tmp_path / "worker.log", {"PATH": os.environ["PATH"]} | settings)
    yield process
    process.kill()


def test_the_logins_can_do_what_they_must_also_once_darkroom_is_installed(
    own_server, supabase_db, early
):
    early.logged("database.lost call=register_worker")
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

    assert early.worker_id == 1  # waited, and found it
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


@pytest.mark.parametrize(
    "role", ["supabase_auth_admin", "supabase_storage_admin", "authenticator", "darkroom_worker"]
)
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
