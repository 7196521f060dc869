"""sql/54_retry.sql: a failed or canceled generation again, by its user or by the operator."""

import pytest
from actors import Service, User, Worker, outcome, refused, together
from database import Database, assert_books_balance, unchanged


@pytest.fixture
def failed(alice, worker):
    """Make jobs of alice that failed; return the id."""

    def fail(code="moderated", **rest):
        job_id = alice.enqueued(**rest)
        worker.fail_job(worker.claimed(), code)
        return job_id

    return fail


def test_a_retry_is_a_new_job_charged_anew(db, alice, failed, worker):
    old = failed(prompt="a lighthouse", params={"width": 512, "num_outputs": 2})

    answer = alice.retry_generation(old)

    assert (answer["status"], answer["credits_left"]) == ("queued", 8)
    new = alice.get_job_status(answer["job_id"])
    assert (new["prompt"], new["params"]) == ("a lighthouse", {"width": 512, "num_outputs": 2})
    assert alice.get_job_status(old)["status"] == "failed"
    assert db.value("select retry_of from public.generations where id = %s", new["job_id"])
    worker.complete_job(worker.claimed(), images=2)
    assert_books_balance(db)


def test_a_new_seed_is_drawn_and_a_given_one_kept(alice, failed, worker):
    for params, same in (({}, False), ({"seed": 7}, True)):
        failed_id = failed(params=params)
        alice.retry_generation(failed_id)
        job = worker.claimed()
        seeds = {
            alice.db.value(
                "select provider_input ->> 'seed' from public.generations where id = %s", each
            )
            for each in (failed_id, job.id)
        }
        assert (len(seeds) == 1) == same
        worker.complete_job(job)


def test_a_canceled_one_may_be_retried(alice):
    job_id = alice.enqueued()
    alice.cancel_generation(job_id)

    assert alice.retry_generation(job_id)["status"] == "queued"


def test_a_double_tap_buys_once(db, alice, failed, worker):
    old = failed()
    devices = [alice.on_another_device() for _ in range(8)]

    answers = together([lambda d=each: d.retry_generation(old) for each in devices])

    assert len({answer["job_id"] for answer in answers}) == 1
    assert alice.credits() == 9
    worker.complete_job(worker.claimed())
    with unchanged(db):
        assert alice.retry_generation(old)["status"] == "completed"


def test_when_the_retry_failed_too_the_old_one_may_be_retried_again(alice, failed, worker):
    old = failed()
    first = alice.retry_generation(old)["job_id"]
    worker.fail_job(worker.claimed(), "moderated")

    assert alice.retry_generation(old)["job_id"] != first


def test_what_has_not_failed_is_not_retried(db, alice, worker):
    job_id = alice.enqueued()
    with unchanged(db), refused("PT409", "not_finished"):
        alice.retry_generation(job_id)

    worker.complete_job(worker.claimed())
    with unchanged(db), refused("PT409", "already_finished"):
        alice.retry_generation(job_id)


def test_a_retry_passes_the_same_gates(db, alice, failed):
    old = failed()
    alice.has(credits=0)
    with unchanged(db), refused("PT402"):
        alice.retry_generation(old)

    alice.has(credits=10)
    for _ in range(3):
        alice.enqueue()
    with unchanged(db), refused("PT429", "too_many_active"):
        alice.retry_generation(old)

    db.execute("update public.models set is_active = false")
    with unchanged(db), refused("PT404"):
        alice.retry_generation(old)


def test_another_users_job_is_not_found(db, bob, failed):
    old = failed()

    with unchanged(db), refused("PT404", "not_found"):
        bob.retry_generation(old)


# The operator's.


def test_redrive_queues_what_failed_with_a_code_since_a_time_free_and_once(
    db, alice, service, failed, worker
):
    wanted = failed("result_lost", params={"num_outputs": 2})
    for _ in range(2):  # three attempts in all
        db.pass_time("61 seconds")
        worker.fail_job(worker.claimed(), "result_lost")
    failed("moderated")
    assert alice.credits() == 10

    assert service.redrive_failed("result_lost", "-infinity") == 1
    assert service.redrive_failed("result_lost", "-infinity") == 0

    job = worker.claimed()
    assert str(db.value("select retry_of from public.generations where id = %s", job.id)) == wanted
    sent = "select provider_input from public.generations where id = %s"
    assert db.value(sent, job.id) == db.value(sent, wanted)
    worker.complete_job(job, images=2)
    assert alice.credits() == 10
    assert alice.get_job_status(job.id)["price_credits"] == 0
    assert_books_balance(db)


def test_redrive_leaves_alone_what_failed_earlier(db, service, failed):
    failed()
    db.pass_time("1 hour")

    assert service.redrive_failed("moderated", "now") == 0
    assert service.redrive_failed("moderated", "yesterday") == 1


def test_redrive_takes_no_more_than_it_is_told(db, alice, service, failed):
    for _ in range(3):
        failed()

    assert service.redrive_failed("moderated", "-infinity", at_most=2) == 2
    assert service.redrive_failed("moderated", "-infinity") == 1
    assert alice.get_entitlement()["active_jobs"] == 3
    assert_books_balance(db)


def test_redrive_and_retry_at_once_make_one_job(db, alice, service, failed):
    old = failed()

    together(
        [
            lambda: outcome(lambda: service.redrive_failed("moderated", "-infinity")),
            lambda: outcome(lambda: alice.retry_generation(old)),
        ]
    )

    assert alice.get_entitlement()["active_jobs"] == 1
    assert_books_balance(db)


@pytest.mark.parametrize(
    "arguments", [("no_such_code", "now"), ("moderated", None), ("moderated", "now", 0)]
)
def test_redrive_refuses_what_it_does_not_know(db, service, arguments):
    code, since, *rest = arguments
    with unchanged(db), refused("PT400", "invalid_input"):
        service.redrive_failed(code, since, **({"at_most": rest[0]} if rest else {}))


def test_a_retry_that_its_user_deleted_is_made_again(alice, failed, worker):
    old = failed()
    first = alice.retry_generation(old)["job_id"]
    worker.complete_job(worker.claimed())
    alice.delete_generation(first)

    again = alice.retry_generation(old)

    assert (again["job_id"] != first, again["status"]) == (True, "queued")


# One picture of each wish, and no more than could be bought.


class Wish:
    """What a user asks for, again and again."""

    def __init__(self, db: Database, alice: User, worker: Worker) -> None:
        db.lift_limits()
        db.execute("update private.settings set max_attempts = 1")
        self.alice, self.worker, self.tries = alice, worker, []

    def asked(self, **rest):
        """Ask for it the first time."""
        self.tries.append(self.alice.enqueued(**rest))
        return self

    def failed(self, code="internal"):
        """See its newest try fail."""
        job = self.worker.claimed()
        assert job.id == self.tries[-1]
        self.worker.fail_job(job, code)
        return self

    def again(self, of):
        """Ask for one of its tries again."""
        self.tries.append(self.alice.retry_generation(self.tries[of])["job_id"])
        return self

    def ended(self, way):
        """See its newest try end, or not, in this way."""
        newest = self.tries[-1]
        if way == "canceled":
            self.alice.cancel_generation(newest)
        elif way != "queued":
            job = self.worker.claimed()
            if way.startswith("completed"):
                self.worker.complete_job(job)
            if way == "completed, deleted":
                self.alice.delete_generation(newest)
        return self


@pytest.fixture
def wish(db, alice, worker):
    return Wish(db, alice, worker)


def repeats(db, *job_ids):
    """What each is redriven by."""
    query = "select id from public.generations where retry_of = %s and status = 'queued'"
    return [len(db.execute(query, job_id)) for job_id in job_ids]


CHAINS = {
    "each of the one before": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "the first again and again": [0, 0, 0],
    "in any order": [0, 1, 0, 2, 1],
}


@pytest.mark.parametrize("chain", CHAINS)
def test_of_a_wish_the_last_try_is_redriven_and_no_other(db, service, wish, chain):
    wish.alice.has(credits=1)
    wish.asked().failed()
    for of in CHAINS[chain]:
        wish.again(of).failed()

    answer = service.redrive("internal")

    assert answer == {"redriven": 1}
    assert repeats(db, *wish.tries) == [0] * len(CHAINS[chain]) + [1]
    assert service.redrive_failed("internal", "-infinity") == 0
    wish.ended("completed")
    assert service.redrive_failed("internal", "-infinity") == 0
    assert (wish.alice.credits(), db.value("select count(*) from public.images")) == (1, 1)


def test_members_of_a_batch_are_wishes_of_their_own(db, alice, service, wish):
    db.execute("update private.plans set max_batch = 3")
    for job_id in alice.enqueue_batch(["one", "two", "three"])["job_ids"]:
        wish.tries.append(job_id)
        wish.failed()
    wish.again(0).failed()

    assert service.redrive("internal") == {"redriven": 3}
    assert repeats(db, *wish.tries) == [0, 1, 1, 1]


@pytest.mark.parametrize(
    "way", ["queued", "processing", "canceled", "completed", "completed, deleted"]
)
@pytest.mark.parametrize("of", [0, 1])
def test_a_wish_is_not_redriven_while_a_try_of_it_is_under_way_done_or_given_up(
    alice, service, wish, way, of
):
    wish.asked().failed().again(0).failed().again(of).ended(way)
    if way == "completed":  # and here not the last
        wish.again(1 - of).failed()

    assert service.redrive("internal") == {"redriven": 0}


@pytest.mark.parametrize(("deleted", "redriven"), [(0, [0, 0, 1]), (1, [0, 0, 1]), (2, [0, 1, 0])])
def test_of_a_wish_whose_tries_are_deleted_the_last_to_be_seen_counts(
    db, service, wish, deleted, redriven
):
    wish.asked().failed().again(0).failed().again(1).failed()
    wish.alice.delete_generation(wish.tries[deleted])

    assert service.redrive_failed("internal", "-infinity") == 1
    assert repeats(db, *wish.tries) == redriven


def test_only_the_code_and_the_time_of_the_last_try_count(db, service, wish):
    wish.asked().failed("internal").again(0).failed("moderated")
    db.pass_time("1 hour")

    assert service.redrive_failed("internal", "-infinity") == 0
    assert service.redrive_failed("moderated", "now") == 0
    assert service.redrive_failed("moderated", "-infinity") == 1


def test_what_was_redriven_and_failed_is_redriven_again_free(db, alice, service, worker, wish):
    wish.asked().failed()
    for _ in range(3):
        assert service.redrive("internal") == {"redriven": 1}
        job = worker.claimed()
        worker.fail_job(job, "internal")
    service.redrive("internal")
    worker.complete_job(worker.claimed())

    assert service.redrive_failed("internal", "-infinity") == 0
    assert alice.credits() == 10
    assert_books_balance(db)


def test_nobody_is_given_more_than_the_credits_at_hand_would_have_bought(db, bob, service, wish):
    db.execute("update public.models set price_credits = 4")
    alice, worker = wish.alice, wish.worker
    alice.has(credits=16)
    for _ in range(50):
        wish.asked(params={"num_outputs": 4}).failed()
    honest = Wish(db, bob, worker).asked(params={"num_outputs": 2}).failed()

    assert service.redrive("internal") == {
        "redriven": 2,
        "skipped": {"insufficient_credits": 49},
    }
    assert repeats(db, *wish.tries) == [1] + [0] * 49
    assert repeats(db, *honest.tries) == [1]
    for _ in range(2):
        assert service.redrive_failed("internal", "-infinity") == 0
        for job in worker.claim_jobs(2):  # the second time they are done
            worker.complete_job(job, images=job.image_count)
    assert (alice.credits(), bob.credits()) == (16, 10)


def test_what_fails_with_another_code_is_not_given_on_top(alice, service, wish):
    alice.has(credits=1)
    wish.asked().failed("internal").asked().failed("moderated")

    assert service.redrive_failed("internal", "-infinity") == 1
    assert service.redrive("moderated") == {"redriven": 0, "skipped": {"insufficient_credits": 1}}


def test_what_was_spent_since_is_not_given_again_and_the_next_outage_is_another(
    db, service, worker, wish
):
    alice = wish.alice.has(credits=1)
    wish.asked().failed()
    alice.enqueue("something else")
    assert service.redrive("internal")["skipped"] == {"insufficient_credits": 1}

    alice.has(credits=1)
    assert service.redrive_failed("internal", "-infinity") == 1
    for job in worker.claim_jobs(2):
        worker.complete_job(job)
    db.pass_time("1 hour")
    lately = db.value("select now() - interval '1 minute'")
    wish.asked().failed()
    assert service.redrive_failed("internal", lately) == 1


UNFIT = {
    "the model is not active": ("not_found", "update public.models set is_active = false"),
    "the model is for paid users": (
        "requires_paid_plan",
        "update public.models set requires_paid = true",
    ),
    "the model is gone": ("not_found", "delete from public.models where id = 'darkroom/preview'"),
    "an input is not allowed any more": (
        "invalid_input",
        "update public.models set client_inputs = array_remove(client_inputs, 'width')",
    ),
    "an input is out of range": (
        "invalid_input",
        "update public.models set input_schema = jsonb_set(input_schema,"
        " '{properties,width,maximum}', '128')",
    ),
    "too many images": ("invalid_input", "update public.models set max_images = 1"),
    "the user is gone": (
        "not_authenticated",
        "set session_replication_role = replica; delete from public.entitlements;"
        " set session_replication_role = origin",
    ),
    "whatever": (
        "internal",
        "alter table private.ready_jobs add constraint no check (fair_key is null)",
    ),
}


@pytest.mark.parametrize("change", UNFIT)
def test_what_fits_no_more_is_skipped_and_told(db, service, wish, change):
    reason, query = UNFIT[change]
    wish.asked(params={"width": 512, "num_outputs": 2}).failed()
    db.execute(query)

    with unchanged(db):
        assert service.redrive("internal") == {"redriven": 0, "skipped": {reason: 1}}


def test_one_that_fits_no_more_stops_no_other_and_takes_no_place(db, service, wish):
    for width in (512, 128, 512, 128, 128):
        wish.asked(params={"width": width}).failed()
    db.execute(UNFIT["an input is out of range"][1])

    answer = service.redrive("internal", at_most=2)

    assert answer == {"redriven": 2, "skipped": {"invalid_input": 2}}
    assert repeats(db, *wish.tries) == [0, 1, 0, 1, 0]
    assert service.redrive("internal", at_most=2)["redriven"] == 1


def test_a_seed_that_the_model_takes_no_more_is_not_sent(db, service, worker, wish):
    wish.asked(params={"seed": 2**30}).failed().asked().failed()
    db.execute(
        "update public.models set input_schema = jsonb_set(input_schema,"
        " '{properties,seed,maximum}', '1')"
    )

    assert service.redrive("internal") == {"redriven": 1, "skipped": {"invalid_input": 1}}
    assert worker.claimed().provider_input["seed"] in (0, 1)


def test_what_is_redriven_waits_while_its_model_is_paused(service, worker, wish):
    wish.asked().failed()
    service.pause_model("darkroom/preview")

    assert service.redrive_failed("internal", "-infinity") == 1
    assert worker.claim_jobs(1) == []


def test_two_operators_at_once_redrive_each_wish_once(db, bob, worker, wish):
    for user in (wish.alice, bob):
        mine = Wish(db, user, worker)
        for _ in range(3):
            mine.asked().failed().again(-1).failed()
    operators = [Service(db) for _ in range(4)]

    answers = together([lambda s=each: s.redrive("internal") for each in operators])

    assert sum(answer["redriven"] for answer in answers) == 6
    assert {key for answer in answers for key in answer} == {"redriven"}
    assert_books_balance(db)
