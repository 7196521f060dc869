"""The local stack's one address: who answers below it, what it lets through, what is left of it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from http_client import PREVIEW, Client, SignedUp, answer
from http_fixtures import endpoints_of
from worker_process import eventually

from processes import spawn
from stack import PROJECT, Functions, PostgREST, Settings, Stack, answers, node

pytest_plugins = ["http_fixtures"]

APP = PROJECT / "examples/expo"
ELSEWHERE = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
# supabase-js sends bytes as they are, `File` and `Blob` in a form, in which the file has no name.
UPLOADS = """
const require = (await import('node:module')).createRequire(process.env.APP);
const { API_URL, ANON_KEY, TOKEN, USER_ID } = process.env;
const { createClient } = require('@supabase/supabase-js');
const global = { headers: { Authorization: `Bearer ${TOKEN}` } };
const inputs = createClient(API_URL, ANON_KEY, { global }).storage.from('inputs');
const png = { type: 'image/png' };
const big = new Uint8Array(3e6).map((_, n) => n % 251);
const form = new FormData();
form.append('cacheControl', '60');
form.append('any', new File(['form'], 'x.png', png));
const sent = {
  blob: [new Blob(['name=""\\r\\n'], png)],
  file: [new File([big], 'x.png', png)],
  form: [form],
  bytes: [big, { contentType: 'image/png' }],
  replaced: [new Blob(['new'], png), { upsert: true }],
};
await inputs.upload(`${USER_ID}/replaced.png`, new Blob(['old'], png));
const seen = {};
for (const [name, [body, options]] of Object.entries(sent)) {
  const path = `${USER_ID}/${name}.png`;
  const { error } = await inputs.upload(path, body, options);
  const { data } = await inputs.createSignedUrl(path, 60);
  const reply = await fetch(data.signedUrl);
  const content = Buffer.from(await reply.arrayBuffer());
  const text = content.length < 99 ? content.toString() : content.equals(Buffer.from(big));
  seen[name] = [error, reply.headers.get('content-type'), text];
}
const { error } = await inputs.upload(`${USER_ID}/page`, new Blob(['<p>'], { type: 'text/html' }));
console.log(JSON.stringify({ ...seen, page: error.message }));
"""


@pytest.fixture
def api(stack: Stack, endpoints) -> str:
    return stack.api_url


def test_supabase_js_uploads_blobs_files_forms_and_bytes(user, stack):
    if not (APP / "node_modules").exists():
        pytest.skip("supabase-js is not installed: make setup-app")
    environment = os.environ | {
        "API_URL": stack.api_url,
        "ANON_KEY": stack.anon_key,
        "TOKEN": str(user.token),
        "USER_ID": user.id,
        "APP": str(APP / "package.json"),
    }
    program = [str(node()), "--input-type=module", "--eval", UPLOADS]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    seen = json.loads(done.stdout)
    assert "text/html is not supported" in seen.pop("page")
    assert seen == {
        "blob": [None, "image/png", 'name=""\r\n'],
        "file": [None, "image/png", True],
        "form": [None, "image/png", "form"],
        "bytes": [None, "image/png", True],
        "replaced": [None, "image/png", "new"],
    }


@pytest.mark.parametrize("path", ["auth/v1/signup", "rest/v1/rpc/ping", "storage/v1/object/inputs"])
def test_a_page_of_another_origin_may_ask(api, path):
    headers = ELSEWHERE | {"Access-Control-Request-Headers": "authorization,apikey,x-client-info"}
    may = httpx.options(f"{api}/{path}", headers=headers)

    assert may.status_code == 204
    assert may.headers["Access-Control-Allow-Origin"] == "*"
    assert "POST" in may.headers["Access-Control-Allow-Methods"]
    assert "apikey" in may.headers["Access-Control-Allow-Headers"]
    refused = httpx.post(f"{api}/auth/v1/signup", json={}, headers=ELSEWHERE)
    assert refused.is_error and refused.headers["Access-Control-Allow-Origin"] == "*"


def test_a_key_alone_stands_for_its_role_and_a_token_outranks_it(api, stack, user):
    def health(**headers: str) -> int:
        return httpx.post(f"{api}/rest/v1/rpc/queue_health", headers=headers).status_code

    assert health() == health(apikey=stack.anon_key) == 401
    assert health(apikey=stack.service_role_key) == health(apikey=stack.monitor_key) == 200
    bearer = {"Authorization": f"Bearer {user.token}"}
    assert health(apikey=stack.service_role_key, **bearer) == 403


def test_edge_functions_answer_below_the_same_address(api, stack, user):
    functions = f"{api}/functions/v1"
    headers = {"Authorization": f"Bearer {user.token}", "apikey": stack.anon_key}
    asked = {"model": PREVIEW, "prompt": "a lighthouse"}

    job = answer(httpx.post(f"{functions}/enqueue_generation", json=asked, headers=headers))
    read = httpx.post(
        f"{functions}/get_job_status", json={"job_id": job["job_id"]}, headers=headers
    )

    assert answer(httpx.get(f"{functions}/ping"))["ok"]
    assert answer(read)["status"] == "queued"
    may = httpx.options(f"{functions}/ping", headers=ELSEWHERE)
    assert (may.status_code, may.headers["Access-Control-Allow-Methods"]) == (
        204,
        "GET, HEAD, POST",
    )
    for unknown in ("nope", "", "..%2fping", "ping%00"):
        assert httpx.get(f"{functions}/{unknown}").status_code == 404, unknown
    without_secret = httpx.post(f"{functions}/stripe_webhook", json={})
    assert (without_secret.status_code, without_secret.json()["code"]) == (503, "BOOT_ERROR")


@pytest.fixture
def own_functions(tmp_path: Path) -> Iterator[Functions]:
    """The server of edge functions, with a folder of the test's own."""
    functions = Functions(tmp_path, Settings(tmp_path / "env"))
    functions.sources = tmp_path / "functions"
    functions.sources.mkdir()
    (functions.sources / ".env").write_text("GREETING=hello\n")
    functions.start({"SUPABASE_URL": "http://localhost"})
    yield functions
    functions.stop()


def test_a_function_is_loaded_when_it_is_called_and_again_when_it_changed(own_functions):
    def says(source: str, name: str = "own") -> tuple[int, str]:
        folder = own_functions.sources / name
        folder.mkdir(exist_ok=True)
        (folder / "index.ts").write_text(source)
        response = httpx.post(f"{own_functions.address()}/{name}/more", content="body")
        return response.status_code, response.text

    body = "new Response(await request.text())"
    assert says(f"Deno.serve(async (request) => {body})") == (200, "body")
    assert says(f"Deno.serve({{}}, async (request) => {body})") == (200, "body")
    assert says(f"export default {{ fetch: async (request) => {body} }}") == (200, "body")
    variables = "[Deno.env.get('SUPABASE_URL'), Deno.env.get('GREETING'), Deno.env.get('HOME')]"
    told = "http://localhost,hello,"
    assert says(f"Deno.serve(() => new Response(String({variables})))") == (200, told)
    failing = "Deno.serve(() => { throw new Error('secret') })"
    status, text = says(failing)
    assert (status, "secret" in text) == (500, False)
    assert says(failing.replace("serve(", "serve({ onError: () => new Response('told') }, ")) == (
        (200, "told")
    )
    for broken in ("}", "throw new Error('secret')", "export default 7"):
        status, text = says(broken)
        assert (status, "secret" in text) == (503, False), broken
    assert says("Promise.reject('late'); Deno.serve(() => new Response('here'))") == (200, "here")
    assert says("Deno.serve(() => new Response('other'))", "other") == (200, "other")
    assert "Error: secret" in own_functions.log.read_text()


RIGHTS = """
select n.nspname, c.relname, regexp_replace(coalesce(c.relacl, acldefault(
  case c.relkind when 'S' then 's'::"char" else 'r' end, c.relowner))::text,
  ',darkroom_catalogue_\\w+=r/\\w+', '')  -- a cell reads what home sends it
from pg_class as c
inner join pg_namespace as n on n.oid = c.relnamespace and n.nspname in ('public', 'private')
where c.relkind in ('r', 'v', 'S') order by 1, 2
"""


def test_nobody_has_a_right_that_darkroom_did_not_give(stack, stack_db, db, user):
    stack.lite.stop()
    stack.up()
    user.upload(f"inputs/{user.id}/a.png", b"\x89PNG").raise_for_status()

    assert stack_db.execute(RIGHTS) == db.execute(RIGHTS)


# What does not get through.


@pytest.mark.parametrize(
    "path",
    [
        "/_system/info",
        "/",
        "//_system/info",
        "/rest/v1/../../_system/info",
        "/storage/v1/%2e%2e/%2e%2e/_system/info",
        "/auth/v1/..%2f..%2f_system/info",
        "/rest/v1x/rpc/ping",
        "/realtime/v1/websocket",
        "http://127.0.0.1/_system/info",
    ],
)
def test_no_path_leads_to_what_lite_tells_of_the_database(api, stack, path):
    asked = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    said = talk(api, asked)

    assert said.split()[1] in {"401", "404"}
    assert stack.settings.secret("POSTGRES_PASSWORD") not in said


def talk(api: str, text: str) -> str:
    """Send bytes and return all that comes until the connection is closed."""
    url = urlsplit(api)
    with socket.create_connection((url.hostname, url.port), timeout=10) as connection:
        connection.sendall(text.encode())
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


HIDDEN = "GET /_system/info HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    "framing",
    [
        f"Content-Length: {len(HIDDEN) + 5}\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Content-Length: 5\r\nContent-Length: 0",
        "Content-Length: 0\r\nConnection: content-length",
        "Transfer-Encoding: chunked\r\nConnection: transfer-encoding",
    ],
)
def test_no_request_is_hidden_in_the_body_of_another(api, stack, framing):
    head = (
        f"POST /auth/v1/signup HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}"
    )

    said = talk(api, f"{head}\r\n\r\n0\r\n\r\n{HIDDEN}")

    assert stack.settings.secret("POSTGRES_PASSWORD") not in said
    assert all(f"HTTP/1.1 {status}" not in said for status in (200, 502)), said


@pytest.mark.parametrize(
    ("path", "most"), [("rest/v1/rpc/ping", 10**6), ("storage/v1/object/a/b", 51 << 20)]
)
@pytest.mark.parametrize("is_told", [True, False], ids=["told", "not told"])
def test_a_body_has_an_end(api, stack, path, most, is_told):
    content = bytes(most + 1)
    headers = {"apikey": stack.service_role_key, "Content-Type": "image/png"}

    sent = content if is_told else iter([content[: most // 2], content[most // 2 :]])
    refused = httpx.post(f"{api}/{path}", content=sent, headers=headers)

    assert (refused.status_code, refused.json()["code"]) == (413, "GATEWAY")
    assert answer(httpx.get(f"{api}/rest/v1/rpc/ping"))["ok"]


# Stacks of these tests' own.


def processes_of(folder: Path) -> set[str]:
    """Return the command lines that name a folder, or run with it as their state."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if str(folder).encode() in command + (process / "environ").read_bytes():
                found.add(command.replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


class WithoutPostgREST(Stack):
    def make_postgrest(self, folder: Path, settings: Settings) -> PostgREST | None:
        return None


@pytest.mark.parametrize("kind", [Stack, WithoutPostgREST])
def test_a_stack_answers_on_the_loopback_address_alone_and_leaves_nothing_behind(state, kind):
    stack = kind(state, fsync=False)
    try:
        with stack.running(), httpx.Client(timeout=30) as http:
            user = SignedUp(endpoints_of(stack, http))
            assert answer(user.enqueue())["status"] == "queued"
            assert user.upload(f"inputs/{user.id}/a.png", b"\x89PNG").status_code == 200
            ping = http.get(f"{stack.api_url}/functions/v1/ping")
            assert answer(ping)["ok"]
            ports = {
                urlsplit(f"//{s.address().rpartition('/')[2]}").port
                for s in stack.services
                if s.address()
            }
            assert len(ports) >= 4 and ports.isdisjoint(open_to_all())
            assert processes_of(stack.folder)
        assert eventually(lambda: not processes_of(stack.folder))
    finally:
        stack.clean()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A folder for a stack, which PostgreSQL's user can get to."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o711)
    yield tmp_path / "state"


def command(state: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts on a stack, by somebody who cannot be asked."""
    program = [sys.executable, str(PROJECT / "scripts" / words[0]), *words[1:]]
    environment = os.environ | {"DARKROOM_STATE": str(state)} | variables
    return subprocess.run(
        program,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_token_is_all_that_is_printed_and_always_of_the_same_user(stack, endpoints):
    printed = [command(stack.folder, "stack.py", "token").stdout for _ in range(2)]

    users = {
        answer(Client(endpoints, each.rstrip("\n")).rpc("get_entitlement"))["user_id"]
        for each in printed
    }
    assert len(users) == 1


def test_what_says_the_environment_to_a_shell_says_nothing_else(state, stack):
    said = command(state, "stack.py", "token")
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == "stack: there is no stack yet: run make up\n"

    up = command(stack.folder, "stack.py", "up")
    stack.worker.stop()
    env = command(stack.folder, "stack.py", "env")

    assert up.stdout == "" and stack.api_url in up.stderr
    assert all(line.startswith("export ") for line in env.stdout.splitlines())


def test_clean_deletes_nothing_where_nobody_can_be_asked(state):
    Settings(state / "env").file.parent.mkdir()
    stack = Stack(state)
    stack.settings.secret("JWT_SECRET")

    refused = command(state, "stack.py", "clean")

    assert refused.returncode == 1 and state.exists()
    assert refused.stderr == (
        f"stack: nothing was deleted: make clean YES=1 deletes {state} without asking\n"
    )
    assert command(state, "stack.py", "clean", YES="1").returncode == 0
    assert not state.exists()


def test_a_phone_reaches_the_api_while_the_app_is_developed_and_not_a_moment_longer(state, stack):
    if not (APP / "node_modules").exists():
        pytest.skip("the app's packages are not installed: make setup-app")
    address = "127.0.0.2"  # stands for this machine's address on a network
    log = state.parent / "expo.log"
    environment = {"DARKROOM_STATE": str(stack.folder), "DEV": address, "EXPO_OFFLINE": "1"}
    program = [sys.executable, str(PROJECT / "scripts/app.py"), "show"]
    app = spawn(program, log=log, cwd=PROJECT, env=os.environ | environment | {"CI": "1"})
    try:
        said = eventually(lambda: re.findall(rf"http://{address}:\d+", log.read_text()))
        assert log.read_text().startswith(f"app: open to everybody on the network of {address}")
        assert answer(httpx.get(f"{said[0]}/rest/v1/rpc/ping"))["ok"]
        app.wait_until(lambda: answers(f"{said[1]}/status"), 60, log)
    finally:
        app.stop(signal.SIGTERM, 10)
        stack.worker.stop()

    assert f"app: {address} is closed again" in log.read_text()
    for url in said:
        with pytest.raises(httpx.TransportError):
            httpx.get(url)
    assert answer(httpx.get(f"{stack.api_url}/rest/v1/rpc/ping"))["ok"]


def open_to_all() -> set[int]:
    """Return the TCP ports on which somebody listens on more than the loopback address."""
    rows = (
        Path("/proc/net/tcp").read_text().splitlines()
        + Path("/proc/net/tcp6").read_text().splitlines()
    )
    listening = [row.split()[1].split(":") for row in rows if row.split()[3] == "0A"]
    return {int(port, 16) for address, port in listening if not address.endswith("7F")}


def test_where_a_part_is_down_that_is_said_and_nothing_else(stack, endpoints):
    stack.lite.stop()
    try:
        said = httpx.get(f"{stack.api_url}/auth/v1/health")
        assert (said.status_code, said.json()["code"]) == (502, "GATEWAY")
        assert "127.0.0.1" not in said.text
        if stack.postgrest:
            assert answer(httpx.get(f"{stack.api_url}/rest/v1/rpc/ping"))["ok"]
    finally:
        stack.up()


def test_code_and_page_say_the_same_of_what_the_local_address_cannot_do():
    """The head of gateway.ts, and the page that users read."""
    head = (PROJECT / "scripts/gateway.ts").read_text().partition("*/")[0]
    page = (PROJECT / "docs/quickstart.md").read_text().partition("local stack cannot do\n")[2]
    page = page.partition("\n## ")[0]

    said, told = (
        re.sub(r"\s[*\s]*", " ", text[text.index("- It asks") :]).strip() for text in (head, page)
    )
    assert said == told
    assert said.count(" - ") == 7


# What make prints and runs.


def make(*words: str) -> str:
    done = subprocess.run(
        ["make", *words], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_names_each_target_once_in_one_of_three_groups():
    makefile = (PROJECT / "Makefile").read_text()
    targets = set(re.findall(r"(?m)^([a-z-]+):", makefile))

    lines = make("help").splitlines()

    assert [line for line in lines if re.match("[A-Z]", line)] == ["Use", "Operate", "Develop"]
    assert sorted(line.split()[0] for line in lines if line.startswith("  ")) == sorted(targets)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("only", "run"),
    [
        ("http", "tests/test_http.py tests/test_http_access.py"),
        ("nothing_of_that_name", "-k nothing_of_that_name"),
        ("tests/test_locks.py -k wait", "tests/test_locks.py -k wait"),
        ("--collect-only", "--collect-only"),
    ],
)
def test_what_only_names_is_run(only, run):
    assert f"pytest {run}" in make("--dry-run", "test", f"ONLY={only}")
