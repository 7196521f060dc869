"""sql/96_webhooks.sql: who is told when a job ends, and the outbox they are told from."""

import base64
import json

import pytest
from actors import Refusal, User, Worker, outcome, refused, together
from database import assert_books_balance, unchanged

TOKEN = "ExponentPushToken[xxxxxxxxxxxxxxxxxxxxxx]"
EXPO = "expo"
NONE = "00000000-0000-0000-0000-000000000000"
LIVE_ONLY = {"stage", "progress", "queue_position", "eta_seconds", "poll_after_ms"}


@pytest.fixture
def hook(service):
    """The id of a webhook that is told everything."""
    return service.register_webhook()["webhook_id"]


@pytest.fixture
def ended(alice, worker):
    """Ends jobs of alice's: completed, canceled, or failed with a code."""

    def end(how: str = "completed") -> str:
        job_id = alice.has(credits=10).enqueued()
        if how == "canceled":
            alice.cancel_generation(job_id)
        elif how == "completed":
            worker.complete_job(worker.claimed())
        else:
            worker.fail_job(worker.claimed(), how)
        return job_id

    return end


def due_in(db) -> float:
    """Return in how many seconds the one delivery is due."""
    return float(db.value("select extract(epoch from run_at - now()) from private.deliveries"))


def count(db, table: str = "deliveries") -> int:
    return db.value(f"select count(*) from private.{table}")


# --- what is written, and when ---


@pytest.mark.parametrize("event", ["completed", "failed", "canceled"])
def test_an_end_is_told_in_the_words_of_get_job_status(alice, worker, hook, ended, event):
    job_id = ended("moderated" if event == "failed" else event)

    (delivery,) = worker.claim_deliveries(hook)

    job, message = alice.get_job_status(job_id), delivery.message
    told = {name: value for name, value in job.items() if name not in LIVE_ONLY}
    assert (message["type"], message["timestamp"]) == (f"generation.{event}", job["finished_at"])
    assert message["data"] == told | {"user_id": alice.id, "batch_id": None}
    assert (job["status"], job["refunded_credits"]) == (event, int(event != "completed"))


def test_only_an_end_that_stays_is_told_and_once(db, alice, worker, hook):
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_error")  # it is tried again
    db.pass_time("1 hour")
    job = worker.claimed()
    with worker.connection.transaction(force_rollback=True):
        worker.complete_job(job)
    assert worker.due_lanes() == []

    worker.complete_job(job)
    worker.complete_job(job)

    assert count(db) == 1


def test_each_webhook_is_told_for_itself_what_it_wants(service, worker, hook, ended):
    other = service.register_webhook()["webhook_id"]
    failures = service.register_webhook(events=["generation.failed"])["webhook_id"]
    ended()
    assert worker.due_lanes() == sorted([hook, other])

    ended("moderated")

    claims = [worker.claim_deliveries(lane) for lane in (hook, other, failures)]
    assert [len(claim) for claim in claims] == [2, 2, 1]
    assert len({delivery.delivery_id for claim in claims for delivery in claim}) == 5
    assert len({claim[0].secrets[0] for claim in claims}) == 3
    assert worker.due_lanes() == []


# --- at least once ---


def test_one_that_cannot_be_put_into_words_is_given_up_and_holds_up_no_other(
    db, worker, service, hook, ended
):
    jobs = [ended() for _ in range(3)]
    db.execute(
        "alter function private.job_json rename to job_json_but_one;"
        "create function private.job_json(g public.generations) returns json language plpgsql as $$"
        f" begin if g.id = '{jobs[0]}' then raise 'poisoned'; end if;"
        " return private.job_json_but_one(g); end $$"
    )

    claimed = worker.claim_deliveries(hook, 3)

    assert [each.message["data"]["job_id"] for each in claimed] == jobs[1:]
    (dead,) = service.list_deliveries(state="dead")
    assert (dead["job_id"], dead["last_error"]) == (jobs[0], "poisoned")
    assert service.alerts().keys() == {"dead_deliveries", "skipped_rows"}


def test_what_dead_workers_were_sending_is_sent_under_the_same_id_and_once_it_is_never_again(
    db, worker, hook, ended
):
    ended()
    (delivery,) = worker.claim_deliveries(hook)
    for _ in range(12):  # more than there are tries
        assert worker.claim_deliveries(hook) == []
        db.pass_time("61 seconds")
        (again,) = Worker(db).claim_deliveries(hook)
        assert again.delivery_id == delivery.delivery_id
        assert again.message["data"]["job_id"] == delivery.message["data"]["job_id"]

    assert worker.finish_delivery(delivery, "failed", 500) == "lost"
    assert worker.finish_delivery(again) == "delivered"

    db.pass_time("1 day")
    assert worker.due_lanes() == worker.claim_deliveries(hook) == []
    with unchanged(db):
        assert worker.finish_delivery(again, "failed", 500) == "lost"


def test_workers_at_the_same_moment_claim_each_delivery_once_the_oldest_first(db, hook):
    db.lift_limits()
    alice, workers = User(db).has(credits=100), [Worker(db) for _ in range(4)]
    jobs = [alice.enqueued() for _ in range(44)]
    for _ in jobs:
        workers[0].complete_job(workers[0].claimed())
    first = workers[0].claim_deliveries(hook, 4)
    assert [each.message["data"]["job_id"] for each in first] == jobs[:4]

    claims = together([lambda w=w: w.claim_deliveries(hook, 40) for w in workers])

    ids = [delivery.delivery_id for claim in [first, *claims] for delivery in claim]
    assert len(ids) == len(set(ids)) == 44
    assert_books_balance(db)


# --- retries ---


def test_failures_wait_longer_and_longer_over_about_a_day_then_the_delivery_is_dead(
    db, worker, service, hook, ended
):
    ended()
    waits = []
    for _ in range(9):
        (delivery,) = worker.claim_deliveries(hook)
        assert worker.finish_delivery(delivery, "failed", 503, "oh") == "pending"
        waits.append(due_in(db))
        db.pass_time(f"{waits[-1] + 1} seconds")
    (delivery,) = worker.claim_deliveries(hook)

    assert worker.finish_delivery(delivery, "failed", 500) == "dead"

    assert waits == sorted(waits)
    assert waits[0] < 7 and 16 * 3600 < sum(waits) < 30 * 3600
    (dead,) = service.list_deliveries(state="dead")
    assert (dead["attempts"], dead["last_status"], dead["run_at"]) == (10, 500, None)


def test_a_wish_of_the_target_counts_if_it_is_longer_up_to_a_day(db, worker, hook, ended):
    ended()
    wishes = ["3600", "-5", "0", "nan", "inf", "", None, "9" * 15, "1000000", "120, 5"]
    waits = []
    for wish in wishes:
        (delivery,) = worker.claim_deliveries(hook)
        assert worker.finish_delivery(delivery, "failed", 429, retry_after=wish) == "pending"
        waits.append(due_in(db))
        db.execute("update private.deliveries set attempts = attempts % 4, run_at = now()")
    (delivery,) = worker.claim_deliveries(hook)

    assert 3590 < waits[0] <= 3600
    assert all(3 < wait <= 86400 for wait in waits)


def test_a_target_that_is_gone_is_told_nothing_more_until_it_is_enabled(
    db, worker, service, hook, ended
):
    ended()
    ended()
    (delivery,) = worker.claim_deliveries(hook, 1)

    assert worker.finish_delivery(delivery, "gone", 410) == "dead"

    ended()
    assert service.list_webhooks()[0]["disabled_at"]
    assert worker.claim_deliveries(hook) == []
    assert [each["state"] for each in service.list_deliveries()] == ["dead", "dead"]
    service.enable_webhook(hook)
    assert service.redeliver_dead(hook) == 2
    (first, _) = worker.claim_deliveries(hook)
    assert (first.delivery_id, worker.finish_delivery(first)) == (delivery.delivery_id, "delivered")
    assert service.redeliver(str(first.delivery_id))["state"] == "pending"
    assert worker.claim_deliveries(hook)[0].delivery_id == first.delivery_id


def test_old_deliveries_are_forgotten_and_those_that_wait_go_with_their_user(
    db, alice, worker, hook, ended
):
    alice.register_push_token(TOKEN)
    ended()
    for lane in (hook, EXPO):
        worker.finish_delivery(worker.claim_deliveries(lane)[0])
    waiting = ended()
    db.pass_time("8 days")
    worker.apply_retention()
    query = "select distinct generation_id::text as id from private.deliveries"
    assert db.execute(query) == [{"id": waiting}]

    db.execute("delete from auth.users where id = %s", alice.id)

    assert count(db) == count(db, "push_tokens") == 0


# --- webhooks are registered ---


def test_a_secret_is_32_random_bytes_shown_once_and_for_a_day_after_a_rotation_both_sign(
    db, service, worker, ended
):
    made = [service.register_webhook(f"https://api.example.com/{n}") for n in range(3)]
    keys = {base64.b64decode(each["secret"].removeprefix("whsec_"), validate=True) for each in made}
    assert [len(key) for key in keys] == [32, 32, 32]
    listed = service.list_webhooks()
    assert [each["webhook_id"] for each in listed] == [each["webhook_id"] for each in made]
    assert "whsec" not in json.dumps(listed)
    ended()

    rotated = service.rotate_webhook_secret(made[0]["webhook_id"])

    (delivery,) = worker.claim_deliveries(made[0]["webhook_id"])
    assert delivery.secrets == [rotated["secret"], made[0]["secret"]]
    db.pass_time("25 hours")
    (delivery,) = worker.claim_deliveries(made[0]["webhook_id"])
    assert delivery.secrets == [rotated["secret"]]


def test_a_deleted_webhook_is_told_nothing_more_and_what_is_added_meanwhile_is_buried(
    alice, service, worker, hook, ended
):
    ended()
    alice.enqueue()
    job = worker.claimed()

    with worker.connection.transaction():
        worker.complete_job(job)
        service.delete_webhook(hook)

    ended()
    assert worker.due_lanes() == [hook]
    assert worker.claim_deliveries(hook) == worker.due_lanes() == service.list_webhooks() == []
    assert [(d["job_id"], d["state"]) for d in service.list_deliveries()] == [(job.id, "dead")]


PUBLIC = """
https://api.example.com https://api.example.com/ https://API.Example.com/Hooks?key=1&x=@y
https://example.com:443/hooks https://example.com:8443/hooks https://xn--bcher-kva.example.org/
https://my_host.example.com?x
"""
# What leads inside, or might, by its words alone; and every address that is no name.
INSIDE = """
http://api.example.com/ ftp://api.example.com/ //api.example.com/ api.example.com https://
https:///hooks https://user:password@api.example.com/ https://user@api.example.com/
https://api.example.com@127.0.0.1/ https://127.0.0.1#@api.example.com/
https://127.0.0.1\\@api.example.com/ https://api.example.com:22/ https://api.example.com:80/
https://api.example.com:0/ https://api.example.com:99999/ https://api.example.com:443:80/
https://api.example.com/#fragment https://ex%61mple.com/ https://exämple.com/
https://①②⑦.0.0.1/ https://localhost/ https://LOCALHOST/ https://localhost./
https://app.localhost/ https://printer.local/ https://metadata.google.internal/
https://router.home.arpa/ https://1.0.0.127.in-addr.arpa/ https://kubernetes/
https://api.example.com./ https://.example.com/ https://a..example.com/ https://-a.example.com/
https://8.8.8.8/ https://[2606:4700:4700::1111]/
https://127.0.0.1/ https://127.0.0.1./ https://127.1/ https://2130706433/ https://0x7f000001/
https://0x7f.0.0.1/ https://0X7F.1/ https://0177.0.0.1/ https://127.0.0.01/
https://127.0.0.0x1/ https://8.8.8.08/ https://256.256.256.256/ https://10.1.2.3/
https://169.254.169.254/latest/meta-data/ https://[::]/ https://[0:0:0:0:0:0:0:1]/
https://[::ffff:7f00:1]/ https://[64:ff9b::7f00:1]/ https://[fe80::1%25eth0]/ https://[:::]/
https://[8.8.8.8]/ https://[]/
"""
NO_ADDRESS = [
    *("", None, "https://api.example.com/a b", "https://api.example.com\n/"),
    *("https://api.example.com/\r\nx-evil: 1", f"https://{'a' * 64}.example.com/"),
    *(f"https://{'a.' * 130}example.com/", f"https://api.example.com/{'a' * 2000}"),
]


def test_addresses_on_the_internet_are_taken_and_what_may_lead_inside_is_refused(db, service):
    for url in PUBLIC.split():
        assert service.register_webhook(url)["secret"], url

    with unchanged(db):
        for url in INSIDE.split() + NO_ADDRESS:
            answer = outcome(lambda url=url: service.register_webhook(url))
            assert isinstance(answer, Refusal), url
            assert (answer.code, answer.token) == ("PT400", "invalid_input")
            assert answer.detail.startswith("url: ")

    db.execute("update private.settings set webhook_allows_private = true")  # for development
    for url in ("http://127.0.0.1:8000/hooks", "http://localhost/", "https://x/"):
        assert service.register_webhook(url)["secret"]
    with refused("PT400"):
        service.register_webhook("http://user:password@127.0.0.1/")


def test_what_is_wrong_with_an_argument_is_said(service):
    for _ in range(20):
        service.register_webhook()
    there = {"url": "https://api.example.com/"}
    calls = {
        "events": ("register_webhook", there | {"events": ["generation.failed", None]}),
        "description": ("register_webhook", there | {"description": "x" * 201}),
        "url": ("register_webhook", there),  # the 21st
        "state": ("list_deliveries", {"state": "lost"}),
        "at_most": ("list_deliveries", {"at_most": None}),
        "webhook_id": ("delete_webhook", {"webhook_id": NONE}),
        "delivery_id": ("redeliver", {"delivery_id": NONE}),
    }

    for named, (function, arguments) in calls.items():
        refusal = outcome(lambda f=function, a=arguments: service.call(f"public.{f}", **a))
        assert refusal.token == ("not_found" if named.endswith("_id") else "invalid_input")
        assert refusal.detail.startswith(f"{named}: ")


# --- push notifications ---


def pushed_to(deliveries):
    return [each.message[0]["to"] for each in deliveries if each.body]


def test_each_device_of_the_user_is_told_that_a_job_ended_but_nothing_of_the_prompt(
    db, alice, bob, worker, ended
):
    bob.register_push_token(TOKEN)
    tokens = [f"ExpoPushToken[{n}]" for n in range(3)]
    for token in tokens:
        alice.register_push_token(token)
    db.execute("delete from private.push_texts where event_type = 'generation.failed'")

    ended("moderated")
    job_id = ended()

    assert worker.due_lanes() == [EXPO]
    told = worker.claim_deliveries(EXPO)
    assert sorted(pushed_to(told)) == tokens
    assert (told[0].url, told[0].secrets) == (None, None)
    words = {"to": pushed_to(told)[0], "title": "Your picture is ready", "body": "Tap to see it."}
    data = {"job_id": job_id, "status": "completed", "batch_id": None}
    assert told[0].message == [words | {"collapseId": job_id, "tag": job_id, "data": data}]


@pytest.mark.parametrize("why", ["somebody else's", "late", "taken back"])
def test_a_device_is_not_told_any_more(alice, bob, worker, ended, why):
    alice.register_push_token(TOKEN)
    bob.unregister_push_token(TOKEN)  # is no concern of his
    ended()

    match why:
        case "somebody else's":
            bob.register_push_token(TOKEN)
        case "late":
            worker.db.pass_time("61 minutes")
        case "taken back":
            alice.unregister_push_token(TOKEN)
            alice.unregister_push_token(TOKEN)

    assert [delivery.body for delivery in worker.claim_deliveries(EXPO)] == [None]
    assert count(worker.db) == 0


def test_users_take_turns_and_who_has_a_push_under_way_waits_for_its_end(db, alice, bob, worker):
    db.lift_limits()
    for n in range(5):
        alice.has(credits=20).register_push_token(f"ExponentPushToken[{n}]")
    bob.register_push_token(TOKEN)
    for user in [alice] * 20 + [bob]:
        user.enqueue()
        worker.complete_job(worker.claimed())

    under_way = worker.claim_deliveries(EXPO, 6)

    assert TOKEN in pushed_to(under_way)
    assert len(under_way) == 6
    assert worker.claim_deliveries(EXPO, 100) == []
    bob.enqueue()
    worker.finish_delivery(next(each for each in under_way if TOKEN in each.body))
    worker.complete_job(worker.claimed())
    assert pushed_to(worker.claim_deliveries(EXPO, 100)) == [TOKEN]

    db.pass_time("61 seconds")  # whoever sent them is dead
    assert len(Worker(db).claim_deliveries(EXPO, 200)) == 101


def test_a_push_is_not_retried_beyond_its_time_nor_a_token_that_expo_does_not_know(
    db, alice, worker, service, ended
):
    alice.register_push_token(TOKEN)
    ended()
    states = []
    while "dead" not in states:
        (delivery,) = worker.claim_deliveries(EXPO)
        states.append(worker.finish_delivery(delivery, "failed", 503))
        if states[-1] == "pending":
            db.pass_time(f"{due_in(db) + 1} seconds")

    assert 4 <= len(states) <= 6
    assert TOKEN not in json.dumps(service.list_deliveries())
    ended()
    (delivery,) = worker.claim_deliveries(EXPO)
    assert worker.finish_delivery(delivery, "gone", 200, "DeviceNotRegistered") == "dead"
    assert count(db, "push_tokens") == 0


def test_a_batch_is_pushed_once_when_its_last_job_has_ended(alice, worker):
    alice.has(credits=10).register_push_token(TOKEN)
    batch = alice.enqueue_batch(["one", "two", "three"])["batch_id"]
    first, second, third = worker.claim_jobs(3)
    worker.complete_job(first)
    assert [delivery.body for delivery in worker.claim_deliveries(EXPO)] == [None]

    worker.complete_job(second)
    worker.complete_job(third)

    told = [delivery.message for delivery in worker.claim_deliveries(EXPO) if delivery.body]
    assert [message[0]["data"]["batch_id"] for message in told] == [batch]


def test_a_user_has_at_most_5_devices_the_last_registered(db, alice):
    def kept() -> set[str]:
        return {row["token"] for row in db.execute("select token from private.push_tokens")}

    for n in [*range(7), 2, 7]:
        alice.register_push_token(f"ExponentPushToken[{n}]")
    assert kept() == {f"ExponentPushToken[{n}]" for n in (2, 4, 5, 6, 7)}

    devices = {f"ExponentPushToken[new-{n}]": alice.on_another_device() for n in range(10)}
    together([lambda d=d, t=t: d.register_push_token(t) for t, d in devices.items()])

    assert len(kept()) == 5


def test_what_is_no_push_token_or_nobodys_is_refused(db, alice):
    long = f"ExponentPushToken[{'x' * 101}]"
    odd = [f"{TOKEN}\n", f" {TOKEN}", "ExponentPushToken[é]", "ExponentPushToken[a b]"]
    for token in [None, "", "x", "ExponentPushToken[]", long, *odd]:
        with unchanged(db), refused("PT400", "invalid_input") as refusal:
            alice.register_push_token(token)
        assert refusal.detail.startswith("token: ")

    db.execute("delete from auth.users where id = %s", alice.id)
    with refused("PT401", "not_authenticated"):
        alice.register_push_token(TOKEN)


# --- receipts ---


@pytest.fixture
def taken(alice, worker, ended):
    """A push that Expo took."""
    alice.register_push_token(TOKEN)
    ended()
    (delivery,) = worker.claim_deliveries(EXPO)
    worker.finish_delivery(delivery, ticket="ticket-1")
    return delivery


def claimed_receipts(worker):
    return worker.connection.execute("select * from private.claim_receipts(1000)").fetchall()


def test_a_receipt_is_asked_for_after_a_quarter_of_an_hour_and_for_a_day(db, worker, taken):
    assert claimed_receipts(worker) == []
    db.pass_time("16 minutes")

    for _ in range(2):
        assert claimed_receipts(worker) == [(taken.delivery_id, "ticket-1")]
        assert claimed_receipts(worker) == []
        db.pass_time("16 minutes")
    db.pass_time("1 day")  # Expo has dropped it

    assert claimed_receipts(worker) == []
    assert db.value("select ticket from private.deliveries") is None


@pytest.mark.parametrize(
    ("said", "tokens"),
    [(None, 1), ("InvalidCredentials", 1), ("DeviceNotRegistered", 0), ("and back since", 1)],
)
def test_a_receipt_may_tell_that_a_token_is_dead(alice, worker, taken, said, tokens):
    db, error = worker.db, "DeviceNotRegistered" if said == "and back since" else said
    db.pass_time("16 minutes")
    if error != said:
        alice.register_push_token(TOKEN)

    query = "select private.finish_receipts(array[%s]::uuid[], array[%s]::text[])"
    worker.connection.execute(query, [taken.delivery_id, error])

    assert count(db, "push_tokens") == tokens
    assert db.row("select ticket, last_error from private.deliveries") == {
        "ticket": None,
        "last_error": error,
    }
