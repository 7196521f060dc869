"""examples/operator/index.html in a real browser: a gateway and a database of these tests' own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from actors import PREVIEW, Service, User, Worker
from app_page import shot
from database import PROJECT, Database
from http_fixtures import gateway_before
from playwright.sync_api import Browser, Page, Request, expect

from stack import Gateway, Settings, Stack, sign_jwt

pytest_plugins = ["http_fixtures"]

PAGE = PROJECT / "examples" / "operator" / "index.html"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
FAR_AWAY = 4_102_444_800
UPSTREAM = ("LITE_URL", "REST_URL", "FUNCTIONS_URL")
MODELS = ["black-forest-labs/flux-schnell", "black-forest-labs/flux-dev", "recraft-ai/recraft-v3"]
DAY = """
with made as (
  insert into public.generations (id, user_id, model_id, prompt, input, provider_input, status,
    error_code, error_message, price_credits, image_count, created_at, started_at, finished_at)
  select
    (left(private.first_id_of(at)::text, 14) || '7' || right(gen_random_uuid()::text, 21))::uuid,
    %s, (%s::text[])[1 + n %% 3], 'a lighthouse', '{}', '{}',
    case n %% 50 when 0 then 'failed' else 'completed' end,
    case n %% 50 when 0 then 'moderated' end, case n %% 50 when 0 then '-' end,
    0, 1, at, at + interval '3 seconds', at + interval '9 seconds'
  from generate_series(now() - interval '1 day', now() - interval '9 seconds', %s)
    with ordinality as request (at, n)
  returning *
)
insert into private.attempts (generation_id, token, model_id, attempt, worker_id, started_at,
  ended_at, outcome, error_code, provider_seconds, provider_images, cost_usd)
select id, 1, model_id, 1, 1, started_at, finished_at, status, error_code, 6, 1, 0.01 from made
"""


CUT = """() => [...document.querySelectorAll('body *')].filter(each => {
  if (!each.checkVisibility() || each.closest('thead') && innerWidth < 640) return false;
  const box = each.getBoundingClientRect();
  const within = each.closest('svg')?.getBoundingClientRect() ?? { left: 0, right: innerWidth };
  return box.left < within.left || box.right > within.right + 1
    || each.scrollWidth > each.clientWidth + 1 && getComputedStyle(each).display !== 'inline';
}).map(each => `${each.tagName} ${each.className}: ${each.textContent.trim().slice(0, 60)}`)"""


class Operator:
    def __init__(self, page: Page, address: str, secret: str) -> None:
        self.page, self.address, self.secret = page, address, secret
        self.problems: list[str] = []
        self.requests: list[Request] = []
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("console", lambda line: self._note(line.type, line.text))
        page.on("request", self._ask)

    def _ask(self, request: Request) -> None:
        self.requests.append(request)

    def _note(self, kind: str, text: str) -> None:
        if kind == "error" and "Failed to load resource" not in text:
            self.problems.append(text)

    def key(self, role: str = "darkroom_monitor", expires_at: int = FAR_AWAY) -> str:
        return sign_jwt(self.secret, {"role": role, "exp": expires_at})

    def enter(self, key: str | None = None, address: str | None = None) -> None:
        self.page.get_by_label("Address of the API").fill(address or self.address)
        self.page.get_by_label("Operator's key").fill(key or self.key())
        self.page.get_by_role("button", name="Look").click()

    def look(self, key: str | None = None) -> Page:
        self.page.goto(PAGE.as_uri())
        self.enter(key)
        expect(self.page.locator(".chart text").last).to_be_visible()
        return self.page

    def alert(self, name: str) -> str:
        """What the alert of that name says."""
        link = self.page.locator(f'a[href$="RUNBOOK.md#{name}"]')
        return self.page.locator(".alert", has=link).text_content() or ""

    def table(self, title: str) -> str:
        """The text of the table of that title."""
        card = self.page.locator("#tables .card", has=self.page.get_by_role("heading", name=title))
        return card.inner_text()

    def cut(self) -> list[str]:
        """What does not fit where it is: elements past the screen, or past what holds them."""
        return self.page.evaluate(CUT)

    def asked(self, name: str) -> list[Request]:
        return [each for each in self.requests if each.url.endswith(f"/rpc/{name}")]


@pytest.fixture
def db(db: Database) -> Database:
    db.lift_limits()
    return db


@pytest.fixture
def rest(db: Database, stopped_stack: Stack) -> Iterator[str]:
    with gateway_before(db, stopped_stack) as url:
        yield url


@pytest.fixture
def gateway(rest: str, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of the test's own, before its own database."""
    gateway = Gateway(tmp_path, Settings(tmp_path / "env"))
    gateway.start(dict.fromkeys(UPSTREAM, rest))
    yield gateway
    gateway.stop()


@pytest.fixture(params=[DESKTOP], ids=["desktop"])
def operator(
    request: pytest.FixtureRequest, browser: Browser, gateway: Gateway, stopped_stack: Stack
) -> Iterator[Operator]:
    """The page, not opened yet, in a profile of its own."""
    context = browser.new_context(
        viewport=request.param, device_scale_factor=2, timezone_id="UTC", locale="en-GB"
    )
    operator = Operator(context.new_page(), gateway.address(), stopped_stack.jwt_secret)
    yield operator
    context.close()
    assert operator.problems == []


def at_work(db: Database, every: str = "5 seconds") -> list[Worker]:
    """A day behind, and workers, queue and running jobs now."""
    db.execute("update public.models set is_active = true")
    user = User(db).has(1000)
    with db.connect() as connection:
        connection.execute("set session_replication_role = replica")  # no triggers: it is history
        connection.execute(DAY, [user.id, MODELS, every])
        connection.execute("analyze public.generations, private.attempts")
    db.execute("update private.settings set lease = '10 minutes', heartbeat = '1 minute'")
    workers = [Worker(db, slots=8) for _ in range(3)]
    db.execute("update private.workers set host = 'render-' || id, version = '0.1.0'")
    for number in range(34):
        user.enqueue(model=MODELS[number % 3])
    for worker in workers:
        for place, job in enumerate(worker.claim_jobs(7)):
            worker.report_progress(job, "generating", 10 + place * 11)
    return workers


@pytest.mark.parametrize(
    ("operator", "name"), [(DESKTOP, "desktop"), (PHONE, "phone")], indirect=["operator"]
)
def test_all_of_it_is_drawn_and_another_range_is_another_history(db, operator, name):
    at_work(db)

    page = operator.look()

    expect(page.locator("#status")).to_have_text("ok")
    expect(page.locator(".tile")).to_have_count(6)
    expect(page.locator(".chart")).to_have_count(6)
    expect(page.locator(".chart", has_text="Jobs a minute").locator("polyline")).to_have_count(2)
    assert "13" in (page.locator(".tile").first.text_content() or "")
    assert "flux-schnell" in operator.table("Models, in the last hour")
    assert operator.cut() == []
    shot(page, name, full=True)
    page.get_by_role("button", name="1 h", exact=True).click()
    expect(page.locator(".chart .now").last).to_contain_text("in 1 h")
    assert operator.asked("queue_history")[-1].post_data_json["bucket_seconds"] == 60


@pytest.mark.parametrize(
    ("operator", "name"), [(DESKTOP, "faults"), (PHONE, "faults-phone")], indirect=["operator"]
)
def test_it_says_what_is_wrong(db, operator, name):
    # Of the six faults: worker dead, cron stopped, NOTIFY lost, key refused, Storage, vacuum.
    workers = at_work(db, "1 minute")
    db.execute("update private.settings set lease = '60 seconds', heartbeat = '15 seconds'")
    User(db).enqueue(model=PREVIEW)
    db.execute("update private.ready_jobs set fair_key = 0 where model_id = %s", PREVIEW)
    storage = Worker(db)
    storage.fail_job(storage.claimed(), "internal", "upload: 403 violates row-level security")
    db.execute("insert into private.routines (name, every) values ('recover', '1 minute')")
    db.pass_time("10 minutes")
    workers[1].heartbeat(is_listening=False)
    workers[2].pause_provider("replicate", 600, "create: HTTP 401: invalid token")
    held = db.connect()
    held.execute("set application_name = 'forgotten psql'")

    with held.transaction():
        held.execute("select pg_current_xact_id()")
        page = operator.look()

        expect(page.locator("#status")).to_have_text("critical")
        assert "HTTP 401" not in operator.alert("paused")  # a monitor is shown nobody's words
        assert "billing and key" in operator.alert("paused")
        assert "recover last ran at" in operator.alert("cron_silent")
        assert "transaction pooler" in operator.alert("not_listening")
        assert "silent" in operator.table("Workers") and "polling" in operator.table("Workers")
        assert "Internal" in operator.table("Errors, in the last hour")
        vacuum = operator.table("Holding back database cleanup")
        assert str(held.info.backend_pid) in vacuum and "forgotten psql" in vacuum
        assert "idle in transaction" in vacuum
        assert operator.cut() == []
        shot(page, name, full=True)


def test_an_alert_leads_to_its_section_of_the_runbook(db, operator):
    db.execute("update private.alert_rules set threshold = null")
    db.execute("update private.alert_rules set threshold = 0 where alert = 'depth'")
    User(db).enqueue()

    page = operator.look()

    link = page.get_by_role("link", name="What to do: many jobs wait")
    target = urlsplit(link.evaluate("each => each.href"))
    runbook = Path(unquote(target.path)).read_text()
    assert f"### `{target.fragment}`\n" in runbook


def test_it_begins_with_an_hour_while_there_is_not_more_than_a_few_and_keeps_what_is_chosen(
    db, operator
):
    user, worker = User(db), Worker(db)
    user.enqueue()
    worker.complete_job(worker.claimed())

    page = operator.look()

    pressed = page.locator("#range [aria-pressed=true]")
    expect(pressed).to_have_text("1 h")
    page.get_by_role("button", name="24 h").click()
    expect(page.locator(".chart .now").last).to_contain_text("in 24 h")
    expect(pressed).to_have_text("24 h")


@pytest.mark.parametrize("role", ["darkroom_monitor", "service_role"])
def test_a_job_is_found_by_its_id_with_its_attempts(db, operator, role):
    user, worker = User(db), Worker(db)
    job_id = user.enqueued(HOSTILE)
    worker.fail_job(worker.claimed(), "provider_error", f"422: {HOSTILE}")
    db.pass_time("1 minute")
    worker.claimed()
    page = operator.look(operator.key(role))
    found = page.locator("#found")

    for wrong, said in ((user.id, "no such job"), ("42", "invalid input syntax")):
        page.get_by_role("textbox", name="One job").fill(wrong)
        page.get_by_role("button", name="Find").click()
        expect(found).to_contain_text(said)
    page.get_by_role("textbox", name="One job").fill(job_id)
    page.get_by_role("textbox", name="One job").press("Enter")

    expect(found).to_contain_text("provider error")
    expect(found).to_contain_text("attempt 2 of worker")
    told = found.inner_text()
    assert (HOSTILE in told, user.id in told) == (role == "service_role",) * 2
    assert operator.cut() == []
    assert page.get_by_role("button", name=f"Show {job_id}").count() == 2 * (role == "service_role")
    shot(page, f"job-{role}", full=True)


@pytest.mark.parametrize("operator", [DESKTOP, PHONE], ids=["desktop", "phone"], indirect=True)
def test_who_may_pauses_and_resumes_models_and_providers(db, operator):
    user = User(db)
    user.enqueue()
    page = operator.look(operator.key("service_role"))

    page.get_by_role("button", name=f"Pause {PREVIEW}").click()
    assert operator.cut() == []
    shot(page, f"pausing-{page.viewport_size['width']}")
    page.get_by_label("For how long").select_option("six hours")
    page.get_by_label("Why, for whoever looks next").fill(HOSTILE)
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()

    expect(page.locator("#tables")).to_contain_text(HOSTILE)
    hours = "select extract(epoch from paused_until - now()) / 3600 from private.breakers"
    assert 5.9 < db.value(hours) <= 6
    page.get_by_role("button", name=f"Resume {PREVIEW}").first.click()
    expect(page.locator("#tables")).to_contain_text("Nothing is paused.")
    page.get_by_role("button", name=f"Pause {PREVIEW}").click()
    page.get_by_role("combobox", name="What").select_option("all that preview makes")
    page.get_by_role("dialog").get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume preview")).to_be_visible()
    assert db.value("select count(*) from private.paused_now where name = 'preview'") == 1


def test_a_monitor_is_shown_nothing_that_it_may_not_do(db, operator):
    User(db).enqueue()
    Service(db).pause_model(PREVIEW)

    page = operator.look()

    expect(page.locator("#tables")).to_contain_text(PREVIEW)
    assert page.get_by_role("button", name=re.compile("Pause|Resume|Show")).count() == 0


def test_what_the_database_says_is_text(db, operator):
    User(db).enqueue()
    worker = Worker(db)
    db.execute("update private.ready_jobs set model_id = %s", HOSTILE)
    worker.fail_job(worker.claimed(), "moderated", HOSTILE)
    db.execute("update private.workers set host = %s, version = %s", HOSTILE, HOSTILE)
    Service(db).pause_model(PREVIEW, reason=HOSTILE)

    page = operator.look()

    expect(page.locator("#tables")).to_contain_text(HOSTILE)
    assert "onerror" not in operator.alert("paused")  # a monitor is shown nobody's words
    assert page.locator("img").count() == page.locator("script").count() - 1 == 0
    assert "owned" not in page.title()


def test_the_policy_lets_nothing_else_run_or_be_reached_and_has_the_right_hashes(operator):
    page = operator.look()
    blocked = page.evaluate(
        """async () => {
          const seen = [];
          document.addEventListener(
            'securitypolicyviolation', event => seen.push(event.effectiveDirective));
          const script = document.createElement('script');
          script.append('document.title = "owned"');
          try { document.head.append(script); } catch { seen.push('trusted types'); }
          await fetch('https://example.com/').catch(() => {});
          await fetch('http://127.0.0.1:9/').catch(() => {});
          document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}));
          try { document.body.innerHTML = '<b>'; } catch { seen.push('innerHTML'); }
          await new Promise(done => setTimeout(done, 300));
          return seen;
        }"""
    )

    operator.problems.clear()  # the console told of the same
    assert blocked.count("connect-src") >= 2
    assert {"img-src", "innerHTML"} <= set(blocked)
    assert "owned" not in page.title()


def test_only_the_api_is_asked_no_address_holds_the_key_and_a_reload_needs_none(operator):
    page = operator.look()
    page.reload()
    expect(page.locator("#status")).to_have_text("ok")

    key = operator.key()
    hosts = {each.url.partition("/rest/")[0] for each in operator.requests}
    assert hosts == {operator.address, PAGE.as_uri()}
    assert all(key not in each.url for each in operator.requests)
    posts = [each for each in operator.requests if each.method == "POST"]
    assert {each.headers["authorization"] for each in posts} == {f"Bearer {key}"}
    assert page.evaluate("localStorage.length") == 0
    assert page.context.cookies() == []
    page.get_by_role("button", name="Forget the key").click()
    expect(page.get_by_label("Operator's key")).to_have_value("")
    assert page.evaluate("sessionStorage.length") == 0


def test_a_key_or_an_address_of_no_use_is_refused_in_words(operator):
    page = operator.page
    page.goto(PAGE.as_uri())
    for key in (operator.key(expires_at=1), operator.key("authenticated"), "no key at all"):
        operator.enter(key)
        expect(page.locator("#problem")).to_contain_text("The key was refused")
        assert page.evaluate("sessionStorage.length") == 0
    for address in ("http://example.com", "javascript:alert(1)"):
        operator.enter(address=address)
        expect(page.locator("#problem")).to_contain_text("must begin with https://")
    operator.enter(address="http://127.0.0.1:9")
    expect(page.locator("#problem")).to_contain_text("cannot be reached")
    operator.problems.clear()  # the browser tells of the refused connection

    operator.enter(operator.key("service_role"))

    expect(page.locator("#status")).to_have_text("ok")


def test_it_looks_again_and_reads_of_history_only_what_is_new(operator):
    page = operator.look()
    page.clock.install()
    page.reload()
    expect(page.locator(".chart")).to_have_count(6)
    reports, histories = (len(operator.asked(f"queue_{what}")) for what in ("report", "history"))

    for _ in range(40):
        page.clock.run_for(5_100)
        page.wait_for_timeout(50)
        if len(operator.asked("queue_history")) > histories:
            break

    assert len(operator.asked("queue_report")) > reports + 3
    first, last = operator.asked("queue_history")[histories - 1 : histories + 1]
    assert last.post_data_json["since"] > first.post_data_json["since"]


def test_it_keeps_what_it_knows_while_there_is_no_answer(operator, gateway, rest):
    page = operator.look()
    gateway.stop()

    expect(page.locator("#status")).to_have_text("no answer", timeout=60_000)
    expect(page.locator(".tile")).to_have_count(6)
    gateway.start(dict.fromkeys(UPSTREAM, rest))

    expect(page.locator("#status")).to_have_text("ok", timeout=30_000)
