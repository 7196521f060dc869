"""sql/96_webhooks.sql: who is told when a job ends, and the outbox they are told from."""

import base64
import json
import time

import pytest
from actors import Refusal, User, Worker, outcome, refused, together
from database import assert_books_balance, unchanged
from test_retention import skipped

TOKEN = "ExponentPushToken[xxxxxxxxxxxxxxxxxxxxxx]"
EXPO = "expo"


@pytest.fixture
def hook(service):
    """The id of a webhook that is told everything."""
    return service.register_webhook()["webhook_id"]


@pytest.fixture
def ended(alice, worker):
    """Ends jobs of alice's: completed, or failed with a code."""

    def end(code: str | None = None) -> str:
        alice.has(credits=10)
        job_id = alice.enqueued()
        job = worker.claimed()
        if code:
            worker.fail_job(job, code)
        else:
            worker.complete_job(job)
        return job_id

    return end


def run_at(db):
    """Return in how many seconds the one delivery is due."""
    return float(db.value("select extract(epoch from run_at - now()) from private.deliveries"))


# --- what is written, and when ---


def test_a_completed_job_is_told_in_the_words_of_get_job_status(alice, worker, hook, ended):
    job_id = ended()

    (delivery,) = worker.claim_deliveries(hook)

    job = alice.get_job_status(job_id)
    message = delivery.message
    assert message["type"] == "generation.completed"
    assert message["timestamp"] == job["finished_at"]
    data = message["data"]
    assert data["user_id"] == alice.id
    assert data["batch_id"] is None
    assert {name: data[name] for name in job if name in data} == {
        name: job[name]
        for name in job
        if name not in ("stage", "progress", "queue_position", "eta_seconds", "poll_after_ms")
    }
    assert data["prompt"] == "a lighthouse at dusk"
    assert data["images"][0]["path"] == f"{alice.id}/{job_id}/0.png"


def test_a_failed_job_is_told_with_its_error_and_the_credits_given_back(worker, hook, ended):
    ended("moderated")

    (delivery,) = worker.claim_deliveries(hook)

    assert delivery.message["type"] == "generation.failed"
    assert delivery.message["data"]["error"]["code"] == "moderated"
    assert delivery.message["data"]["refunded_credits"] == 1
    assert delivery.message["data"]["images"] == []


def test_a_canceled_job_is_told(db, alice, worker, hook):
    alice.enqueue()
    job = worker.claimed()
    db.execute("update private.running_jobs set cancel_requested = true")

    worker.release_job(job)

    (delivery,) = worker.claim_deliveries(hook)
    assert delivery.message["type"] == "generation.canceled"
    assert delivery.message["data"]["status"] == "canceled"


def test_nothing_is_told_before_the_job_has_ended(alice, worker, hook):
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_error")

    assert worker.due_lanes() == []


def test_a_job_whose_end_is_rolled_back_is_not_told(db, alice, worker, hook):
    alice.enqueue()
    job = worker.claimed()

    with worker.connection.transaction(force_rollback=True):
        worker.complete_job(job)

    assert db.value("select count(*) from private.deliveries") == 0


def test_completing_twice_tells_once(db, alice, worker, hook):
    alice.enqueue()
    job = worker.claimed()

    worker.complete_job(job)
    worker.complete_job(job)

    assert db.value("select count(*) from private.deliveries") == 1


def test_a_webhook_is_told_only_the_events_it_wants(service, worker, ended):
    hook = service.register_webhook(events=["generation.failed"])["webhook_id"]
    ended()
    assert worker.due_lanes() == []

    ended("moderated")

    assert worker.due_lanes() == [hook]


def test_every_webhook_is_told_for_itself(service, worker, ended):
    hooks = [service.register_webhook()["webhook_id"] for _ in range(3)]
    ended()

    claimed = [worker.claim_deliveries(hook)[0] for hook in hooks]

    assert sorted(worker.due_lanes()) == []
    assert len({delivery.delivery_id for delivery in claimed}) == 3
    assert len({delivery.secrets[0] for delivery in claimed}) == 3


def test_a_job_that_ends_a_second_time_is_told_anew_in_place_of_the_first(db, worker, hook, ended):
    job_id = ended("moderated")
    (first,) = worker.claim_deliveries(hook)

    db.execute(
        "update public.generations set status = 'completed', error_code = null where id = %s",
        job_id,
    )

    assert worker.finish_delivery(first) == "lost"
    (second,) = worker.claim_deliveries(hook)
    assert second.delivery_id != first.delivery_id
    assert db.value("select count(*) from private.deliveries") == 1


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
    assert skipped(db) == {"claim_deliveries": 1}
    assert service.alerts().keys() == {"dead_deliveries", "skipped_rows"}


def test_what_is_delivered_is_not_sent_again(db, worker, hook, ended):
    ended()
    (delivery,) = worker.claim_deliveries(hook)

    assert worker.finish_delivery(delivery) == "delivered"

    db.pass_time("1 day")
    assert worker.due_lanes() == []
    assert worker.claim_deliveries(hook) == []
    with unchanged(db):
        assert worker.finish_delivery(delivery, "failed", 500) == "lost"


def test_what_a_dead_worker_was_sending_is_sent_by_another_under_the_same_id(
    db, worker, hook, ended
):
    ended()
    (delivery,) = worker.claim_deliveries(hook)
    assert Worker(db).claim_deliveries(hook) == []

    db.pass_time("61 seconds")

    (again,) = Worker(db).claim_deliveries(hook)
    assert again.delivery_id == delivery.delivery_id
    assert again.message["data"]["job_id"] == delivery.message["data"]["job_id"]
    assert worker.finish_delivery(delivery, "failed", 500) == "lost"
    assert worker.finish_delivery(again) == "delivered"


def test_a_dead_worker_costs_no_try(db, worker, hook, ended):
    ended()

    for _ in range(30):
        assert len(worker.claim_deliveries(hook)) == 1
        db.pass_time("61 seconds")

    assert db.row("select state, attempts from private.deliveries") == {
        "state": "pending",
        "attempts": 0,
    }


def test_workers_at_the_same_moment_claim_each_delivery_once(db, service, hook):
    db.lift_limits()
    alice = User(db).has(credits=100)
    workers = [Worker(db) for _ in range(4)]
    for _ in range(40):
        alice.enqueue()
    for job in workers[0].claim_jobs(40):
        workers[0].complete_job(job)

    claims = together([lambda w=w: w.claim_deliveries(hook, 40) for w in workers])

    ids = [delivery.delivery_id for claim in claims for delivery in claim]
    assert len(ids) == len(set(ids)) == 40
    assert_books_balance(db)


def test_a_claim_takes_no_more_than_it_was_told_the_oldest_first(db, worker, hook, ended):
    jobs = [ended() for _ in range(3)]

    first, second = worker.claim_deliveries(hook, 2)

    assert [each.message["data"]["job_id"] for each in (first, second)] == jobs[:2]
    assert worker.due_lanes() == [hook]


# --- retries ---


def test_failures_wait_longer_and_longer_over_about_a_day_then_the_delivery_is_dead(
    db, worker, service, hook, ended
):
    ended()
    waits = []
    for _ in range(9):
        (delivery,) = worker.claim_deliveries(hook)
        assert worker.finish_delivery(delivery, "failed", 503, "oh") == "pending"
        waits.append(run_at(db))
        db.pass_time(f"{waits[-1] + 1} seconds")
    (delivery,) = worker.claim_deliveries(hook)

    assert worker.finish_delivery(delivery, "failed", 500) == "dead"

    assert waits == sorted(waits)
    assert waits[0] < 7 and 16 * 3600 < sum(waits) < 30 * 3600
    (dead,) = service.list_deliveries(state="dead")
    assert (dead["attempts"], dead["last_status"], dead["run_at"]) == (10, 500, None)


def test_what_the_target_asks_to_wait_counts_if_it_is_longer(db, worker, hook, ended):
    ended()
    (delivery,) = worker.claim_deliveries(hook)

    worker.finish_delivery(delivery, "failed", 429, retry_after=3600)

    assert 3590 < run_at(db) <= 3600


WISHES = [-5.0, 0.0, float("nan"), float("inf"), float("-inf"), 1e308, -1e308, 1e6]


@pytest.mark.parametrize("asked", WISHES)
def test_no_wish_of_the_target_is_longer_than_a_day_or_shorter_than_ours(
    db, worker, hook, ended, asked
):
    ended()
    (delivery,) = worker.claim_deliveries(hook)

    worker.finish_delivery(delivery, "failed", 429, retry_after=asked)

    assert 3 < run_at(db) <= 86400


def test_a_target_that_asks_for_nonsense_is_given_up_like_any_other(db, worker, hook, ended):
    ended()
    states = []
    while "dead" not in states:
        (delivery,) = worker.claim_deliveries(hook)
        states.append(worker.finish_delivery(delivery, "failed", 429, retry_after=-1e308))
        db.execute("update private.deliveries set run_at = now()")

    assert len(states) == 10


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
    assert len(worker.claim_deliveries(hook)) == 2


def test_a_dead_or_delivered_one_is_sent_again_under_its_id_when_an_operator_asks(
    worker, service, hook, ended
):
    ended()
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery)
    (shown,) = service.list_deliveries(state="delivered")

    assert service.redeliver(shown["delivery_id"])["state"] == "pending"

    assert worker.claim_deliveries(hook)[0].delivery_id == delivery.delivery_id


def test_a_lane_is_found_however_many_deliveries_wait_in_another(db, service, worker, hook, ended):
    other = service.register_webhook(events=["generation.failed"])["webhook_id"]
    job_id = ended("moderated")
    db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input,"
        " price_credits, image_count) select user_id, model_id, '', '{}', '{}', 1, 1"
        " from public.generations, generate_series(1, 20000) where id = %s",
        job_id,
    )
    db.execute(
        "insert into private.deliveries (generation_id, event_type, lane)"
        " select id, 'generation.failed', %s from public.generations where prompt = ''",
        hook,
    )
    db.execute("analyze private.deliveries")

    assert sorted(worker.due_lanes()) == sorted([hook, other])
    plan = db.execute(
        "explain (analyze, format json) select d.id from private.deliveries as d"
        " where d.state = 'pending' and d.lane = %s and d.run_at <= now()"
        " order by d.run_at limit 4 for update skip locked",
        hook,
    )[0]["QUERY PLAN"]
    assert "deliveries_pending_idx" in json.dumps(plan)


def test_old_deliveries_are_forgotten_and_those_that_wait_are_kept(db, worker, hook, ended):
    ended()
    worker.finish_delivery(worker.claim_deliveries(hook)[0])
    waiting = ended()

    db.pass_time("8 days")
    worker.apply_retention()

    assert [
        str(row["generation_id"]) for row in db.execute("select * from private.deliveries")
    ] == [waiting]


def test_deliveries_go_with_their_user(db, alice, hook, ended):
    ended()
    alice.register_push_token(TOKEN)

    db.execute("delete from auth.users where id = %s", alice.id)

    assert db.value("select count(*) from private.deliveries") == 0
    assert db.value("select count(*) from private.push_tokens") == 0


# --- webhooks are registered ---


def test_a_secret_is_32_random_bytes_and_shown_once(service):
    made = [service.register_webhook(f"https://api.example.com/{n}") for n in range(5)]

    keys = [base64.b64decode(each["secret"].removeprefix("whsec_"), validate=True) for each in made]
    assert {len(key) for key in keys} == {32}
    assert len(set(keys)) == 5
    listed = service.list_webhooks()
    assert [each["webhook_id"] for each in listed] == [each["webhook_id"] for each in made]
    assert "whsec" not in json.dumps(listed)


def test_for_a_day_after_a_rotation_both_secrets_sign(db, service, worker, ended):
    made = service.register_webhook()
    ended()

    rotated = service.rotate_webhook_secret(made["webhook_id"])

    (delivery,) = worker.claim_deliveries(made["webhook_id"])
    assert delivery.secrets == [rotated["secret"], made["secret"]]
    db.pass_time("25 hours")
    (delivery,) = worker.claim_deliveries(made["webhook_id"])
    assert delivery.secrets == [rotated["secret"]]


def test_a_deleted_webhook_is_told_nothing_more(service, worker, hook, ended):
    ended()

    service.delete_webhook(hook)

    ended()
    assert service.list_webhooks() == service.list_deliveries() == []


def test_what_a_job_adds_that_ends_while_the_webhook_is_deleted_is_buried(
    alice, service, worker, hook
):
    alice.enqueue()
    job = worker.claimed()

    with worker.connection.transaction():
        worker.complete_job(job)
        service.delete_webhook(hook)

    assert worker.due_lanes() == [hook]
    assert worker.claim_deliveries(hook) == []
    assert worker.due_lanes() == []
    assert [each["state"] for each in service.list_deliveries()] == ["dead"]


@pytest.mark.parametrize("function", ["delete_webhook", "enable_webhook", "rotate_webhook_secret"])
def test_a_webhook_that_is_not_there_is_not_found(service, function):
    with refused("PT404", "not_found") as refusal:
        service.call(f"public.{function}", webhook_id="00000000-0000-0000-0000-000000000000")

    assert "webhook_id" in refusal.detail


def test_a_delivery_that_is_not_there_is_not_found(service):
    with refused("PT404", "not_found"):
        service.redeliver("00000000-0000-0000-0000-000000000000")


PUBLIC = [
    "https://api.example.com",
    "https://api.example.com/",
    "https://API.Example.com/Hooks?key=1&x=@y",
    "https://example.com:443/hooks",
    "https://example.com:8443/hooks",
    "https://xn--bcher-kva.example.org/",
    "https://my_host.example.com?x",
]
# What leads inside, or might, by its words alone; and every address that is no name.
NOT_PUBLIC = [
    "http://api.example.com/",
    "ftp://api.example.com/",
    "//api.example.com/",
    "api.example.com",
    "",
    None,
    "https://",
    "https:///hooks",
    "https://user:password@api.example.com/",
    "https://user@api.example.com/",
    "https://api.example.com@127.0.0.1/",
    "https://127.0.0.1#@api.example.com/",
    "https://127.0.0.1\\@api.example.com/",
    "https://api.example.com:22/",
    "https://api.example.com:80/",
    "https://api.example.com:0/",
    "https://api.example.com:99999/",
    "https://api.example.com:443:80/",
    "https://api.example.com/#fragment",
    "https://api.example.com/a b",
    "https://api.example.com/\r\nx-evil: 1",
    "https://api.example.com\n/",
    "https://ex%61mple.com/",
    "https://exämple.com/",
    "https://①②⑦.0.0.1/",
    "https://localhost/",
    "https://LOCALHOST/",
    "https://localhost./",
    "https://app.localhost/",
    "https://printer.local/",
    "https://metadata.google.internal/",
    "https://router.home.arpa/",
    "https://1.0.0.127.in-addr.arpa/",
    "https://kubernetes/",
    "https://api.example.com./",
    "https://.example.com/",
    "https://a..example.com/",
    "https://-a.example.com/",
    "https://8.8.8.8/",
    "https://[2606:4700:4700::1111]/",
    "https://127.0.0.1/",
    "https://127.0.0.1./",
    "https://127.1/",
    "https://127.0.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0X7F.1/",
    "https://0177.0.0.1/",
    "https://127.0.0.01/",
    "https://127.0.0.0x1/",
    "https://8.8.8.08/",
    "https://256.256.256.256/",
    "https://0.0.0.0/",
    "https://10.1.2.3/",
    "https://100.100.100.200/",
    "https://168.63.129.16/",
    "https://169.254.169.254/latest/meta-data/",
    "https://172.16.0.1/",
    "https://172.31.255.255/",
    "https://192.0.0.192/",
    "https://192.168.1.1/",
    "https://198.18.0.1/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[::]/",
    "https://[::1]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[2001:0:7f00:1::]/",
    "https://[fd00:ec2::254]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[fec0::1]/",
    "https://[ff02::1]/",
    "https://[2001:db8::1]/",
    "https://[:::]/",
    "https://[8.8.8.8]/",
    "https://[]/",
    f"https://{'a' * 64}.example.com/",
    f"https://{'a.' * 130}example.com/",
    f"https://api.example.com/{'a' * 2000}",
]


def test_addresses_on_the_internet_are_taken(service):
    for url in PUBLIC:
        assert service.register_webhook(url)["secret"], url


def test_addresses_that_may_lead_inside_are_refused(db, service):
    with unchanged(db):
        answers = {
            url: outcome(lambda url=url: service.register_webhook(url)) for url in NOT_PUBLIC
        }

    taken = [url for url, answer in answers.items() if not isinstance(answer, Refusal)]
    assert taken == []
    assert {(answer.code, answer.token) for answer in answers.values()} == {
        ("PT400", "invalid_input")
    }
    assert all(answer.detail.startswith("url: ") for answer in answers.values())


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/hooks", "http://localhost/", "https://x/"])
def test_for_development_any_host_is_taken(db, service, url):
    db.execute("update private.settings set webhook_allows_private = true")

    assert service.register_webhook(url)["secret"]
    with refused("PT400"):
        service.register_webhook("http://user:password@127.0.0.1/")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("events", []),
        ("events", ["generation.queued"]),
        ("events", ["generation.failed", None]),
        ("events", ["generation.failed"] * 4),
        ("description", "x" * 201),
    ],
)
def test_bad_arguments_are_named(db, service, field, value):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        service.register_webhook(**{field: value})

    assert refusal.detail.startswith(f"{field}: ")


def test_there_are_at_most_20_webhooks(service):
    for _ in range(20):
        service.register_webhook()

    with refused("PT400", "invalid_input"):
        service.register_webhook()


@pytest.mark.parametrize("arguments", [{"state": "lost"}, {"at_most": 0}, {"at_most": None}])
def test_a_list_that_makes_no_sense_is_refused(service, arguments):
    with refused("PT400", "invalid_input") as refusal:
        service.list_deliveries(**arguments)

    assert refusal.detail.startswith(next(iter(arguments)))


# --- push notifications ---


def test_a_device_is_told_that_a_job_ended_but_nothing_of_the_prompt(alice, worker, ended):
    alice.register_push_token(TOKEN)

    job_id = ended()

    assert worker.due_lanes() == [EXPO]
    (delivery,) = worker.claim_deliveries(EXPO)
    assert (delivery.url, delivery.secrets) == (None, None)
    assert delivery.message == [
        {
            "to": TOKEN,
            "title": "Your picture is ready",
            "body": "Tap to see it.",
            "collapseId": job_id,
            "tag": job_id,
            "data": {"job_id": job_id, "status": "completed", "batch_id": None},
        }
    ]


def test_each_device_of_the_user_is_told_and_nobody_elses(alice, bob, worker, ended):
    tokens = [f"ExpoPushToken[{n}]" for n in range(3)]
    for token in tokens:
        alice.register_push_token(token)
    bob.register_push_token(TOKEN)

    ended()

    told = [delivery.message[0]["to"] for delivery in worker.claim_deliveries(EXPO)]
    assert sorted(told) == tokens


def test_an_event_without_a_text_is_not_pushed(db, alice, worker, ended):
    alice.register_push_token(TOKEN)
    db.execute("delete from private.push_texts where event_type = 'generation.failed'")

    ended("moderated")

    assert db.value("select count(*) from private.deliveries") == 0


def test_a_device_that_is_somebody_elses_by_now_is_not_told(db, alice, bob, worker, ended):
    alice.register_push_token(TOKEN)
    ended()

    bob.register_push_token(TOKEN)

    assert [delivery.body for delivery in worker.claim_deliveries(EXPO)] == [None]
    assert db.value("select count(*) from private.deliveries") == 0


def test_a_token_taken_back_is_not_told_and_only_its_owner_can_take_it_back(
    alice, bob, worker, ended
):
    alice.register_push_token(TOKEN)
    bob.unregister_push_token(TOKEN)
    ended()
    assert worker.due_lanes() == [EXPO]

    alice.unregister_push_token(TOKEN)
    alice.unregister_push_token(TOKEN)

    assert [delivery.body for delivery in worker.claim_deliveries(EXPO)] == [None]


def test_a_token_that_expo_does_not_know_any_more_is_forgotten(db, alice, worker, ended):
    alice.register_push_token(TOKEN)
    ended()
    (delivery,) = worker.claim_deliveries(EXPO)

    assert worker.finish_delivery(delivery, "gone", 200, "DeviceNotRegistered") == "dead"

    assert db.value("select count(*) from private.push_tokens") == 0


def pushed_to(deliveries):
    return [each.message[0]["to"] for each in deliveries]


@pytest.fixture
def crowd(db, alice, bob, worker):
    """Alice has 5 devices and 20 ended jobs, all before bob's one job and device."""
    db.lift_limits()
    for n in range(5):
        alice.has(credits=20).register_push_token(f"ExponentPushToken[{n}]")
    bob.register_push_token(TOKEN)
    for user in [alice] * 20 + [bob]:
        user.enqueue()
        worker.complete_job(worker.claimed())


def test_users_take_turns_to_be_pushed_to(crowd, worker):
    first = worker.claim_deliveries(EXPO, 6)

    assert TOKEN in pushed_to(first)
    assert len(first) == 6


def test_who_has_a_push_under_way_waits_for_its_end_and_nobody_waits_for_him(
    crowd, bob, worker, db
):
    under_way = worker.claim_deliveries(EXPO, 6)
    assert worker.claim_deliveries(EXPO, 100) == []
    bob.enqueue()
    worker.finish_delivery(next(each for each in under_way if TOKEN in each.body))
    worker.complete_job(worker.claimed())

    assert pushed_to(worker.claim_deliveries(EXPO, 100)) == [TOKEN]

    db.pass_time("61 seconds")  # whoever sent them is dead
    assert len(Worker(db).claim_deliveries(EXPO, 200)) == 101


def test_a_claim_is_quick_however_many_pushes_wait(crowd, db, worker):
    db.execute(
        "insert into private.deliveries (generation_id, event_type, lane, push_token, user_id)"
        " select d.generation_id, d.event_type, 'expo', format('t%s-%s', n, d.id),"
        " case when n > 50 then d.user_id else gen_random_uuid() end"
        " from private.deliveries as d, generate_series(1, 300) as n"
    )
    db.execute("analyze private.deliveries")
    began = time.monotonic()

    assert len(worker.claim_deliveries(EXPO, 100)) == 100
    assert time.monotonic() - began < 1


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
    rows = worker.connection.execute("select * from private.claim_receipts(1000)").fetchall()
    return [(row[0], row[1]) for row in rows]


def finish_receipts(worker, delivery, error):
    query = "select private.finish_receipts(array[%s]::uuid[], array[%s]::text[])"
    worker.connection.execute(query, [delivery.delivery_id, error])


def test_a_receipt_is_asked_for_after_a_quarter_of_an_hour_until_it_is_there(db, worker, taken):
    assert claimed_receipts(worker) == []
    db.pass_time("16 minutes")

    for _ in range(2):
        assert claimed_receipts(worker) == [(taken.delivery_id, "ticket-1")]
        assert claimed_receipts(worker) == []
        db.pass_time("16 minutes")
    finish_receipts(worker, taken, None)

    assert claimed_receipts(worker) == []
    assert db.value("select last_error from private.deliveries") is None


def test_a_receipt_is_not_asked_for_once_expo_has_dropped_it(db, worker, taken):
    db.pass_time("25 hours")

    assert claimed_receipts(worker) == []
    assert db.value("select ticket from private.deliveries") is None


@pytest.mark.parametrize(
    ("said", "tokens"),
    [
        (("DeviceNotRegistered", False), 0),
        (("DeviceNotRegistered", True), 1),
        (("InvalidCredentials", False), 1),
    ],
)
def test_a_receipt_may_tell_that_a_token_is_dead(alice, worker, taken, said, tokens):
    error, registered_again = said  # and by a device that came back since
    db = worker.db
    db.pass_time("16 minutes")
    if registered_again:
        alice.register_push_token(TOKEN)

    finish_receipts(worker, taken, error)

    assert db.value("select count(*) from private.push_tokens") == tokens
    assert db.value("select last_error from private.deliveries") == error


def test_a_push_that_is_late_is_not_sent_any_more(db, alice, worker, ended):
    alice.register_push_token(TOKEN)
    ended()

    db.pass_time("61 minutes")

    assert [delivery.body for delivery in worker.claim_deliveries(EXPO)] == [None]


def test_a_push_is_not_retried_beyond_its_time(db, alice, worker, service, ended):
    alice.register_push_token(TOKEN)
    ended()
    states = []
    while "dead" not in states:
        (delivery,) = worker.claim_deliveries(EXPO)
        states.append(worker.finish_delivery(delivery, "failed", 503))
        if states[-1] == "pending":
            db.pass_time(f"{run_at(db) + 1} seconds")

    assert 4 <= len(states) <= 6
    assert TOKEN not in json.dumps(service.list_deliveries())


def test_a_batch_is_pushed_once_when_its_last_job_has_ended(db, alice, worker):
    alice.has_paid().has(credits=10).register_push_token(TOKEN)
    jobs = [alice.enqueued() for _ in range(3)]
    batch = db.value(
        "insert into public.batches (user_id, request_hash, job_count) values (%s, '', 3)"
        " returning id",
        alice.id,
    )
    db.execute("update public.generations set batch_id = %s", batch)
    first, second, third = worker.claim_jobs(3)
    worker.complete_job(first)
    assert [delivery.body for delivery in worker.claim_deliveries(EXPO)] == [None]

    worker.complete_job(second)
    worker.complete_job(third)

    told = [delivery.message for delivery in worker.claim_deliveries(EXPO) if delivery.body]
    assert [message[0]["data"]["batch_id"] for message in told] == [str(batch)]
    assert told[0][0]["data"]["job_id"] in jobs


def test_a_user_has_at_most_5_devices_the_last_registered(db, alice):
    for n in range(7):
        alice.register_push_token(f"ExponentPushToken[{n}]")
    alice.register_push_token("ExponentPushToken[2]")
    alice.register_push_token("ExponentPushToken[7]")

    tokens = {row["token"] for row in db.execute("select token from private.push_tokens")}
    kept = [2, *range(4, 8)]
    assert tokens == {f"ExponentPushToken[{n}]" for n in kept}


def test_calls_at_the_same_moment_do_not_pass_the_cap(db, alice):
    devices = [alice.on_another_device() for _ in range(10)]
    for n in range(3):
        alice.register_push_token(f"ExponentPushToken[{n}]")

    together(
        [
            lambda d=d, n=n: d.register_push_token(f"ExponentPushToken[new-{n}]")
            for n, d in enumerate(devices)
        ]
    )

    assert db.value("select count(*) from private.push_tokens") == 5


@pytest.mark.parametrize(
    "token",
    [
        None,
        "",
        "x",
        "ExponentPushToken[]",
        "ExponentPushToken[a b]",
        f"ExponentPushToken[{'x' * 101}]",
        f"{TOKEN}\n",
        f" {TOKEN}",
        "ExponentPushToken[é]",
    ],
)
def test_what_is_no_push_token_is_refused(db, alice, token):
    with unchanged(db), refused("PT400", "invalid_input") as refusal:
        alice.register_push_token(token)

    assert refusal.detail.startswith("token: ")


def test_a_user_who_is_gone_registers_nothing(db, alice):
    db.execute("delete from auth.users where id = %s", alice.id)

    with refused("PT401", "not_authenticated"):
        alice.register_push_token(TOKEN)
