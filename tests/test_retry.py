"""sql/54_retry.sql: a failed or canceled generation again, by its user or by the operator."""

import pytest
from actors import Service, User, Worker, refused, together
from database import Database, assert_books_balance, unchanged


class Wish:
    """What a user asks for, again and again."""

    def __init__(self, db: Database, user: User, worker: Worker) -> None:
        db.lift_limits()
        db.execute("update private.settings set max_attempts = 1")
        self.user, self.worker, self.tries = user, worker, []

    def asked(self, **rest):
        self.tries.append(self.user.enqueued(**rest))
        return self

    def failed(self, code="internal"):
        job = self.worker.claimed()
        assert job.id == self.tries[-1]
        self.worker.fail_job(job, code)
        return self

    def again(self, of=-1):
        self.tries.append(self.user.retry_generation(self.tries[of])["job_id"])
        return self

    def completed(self):
        job = self.worker.claimed()
        self.worker.complete_job(job, images=job.image_count)
        return self


@pytest.fixture
def wish(db, alice, worker):
    return Wish(db, alice, worker)


def repeats(wish):
    """How often each try is being made again."""
    query = "select id from public.generations where retry_of = %s and status = 'queued'"
    return [len(wish.user.db.execute(query, job_id)) for job_id in wish.tries]


# The user's.


@pytest.mark.parametrize(("seed", "is_kept"), [({}, False), ({"seed": 7}, True)])
def test_a_retry_is_a_new_job_charged_anew_with_the_seed_that_was_given(db, wish, seed, is_kept):
    params = {"width": 512, "num_outputs": 2} | seed
    wish.asked(prompt="a lighthouse", params=params).failed("moderated").again()

    old, new = (wish.user.get_job_status(job_id) for job_id in wish.tries)
    assert (old["status"], new["status"], wish.user.credits()) == ("failed", "queued", 8)
    assert (new["prompt"], new["params"]) == ("a lighthouse", params)
    seeds = db.execute("select distinct provider_input ->> 'seed' from public.generations")
    assert (len(seeds) == 1) == is_kept
    assert_books_balance(db)


def test_a_double_tap_buys_once(db, alice, wish):
    old = wish.asked().failed().tries[0]
    devices = [alice.on_another_device() for _ in range(8)]

    answers = together([lambda d=each: d.retry_generation(old) for each in devices])

    assert len({answer["job_id"] for answer in answers}) == 1
    assert alice.credits() == 9
    wish.tries.append(answers[0]["job_id"])
    wish.completed()
    with unchanged(db):
        assert alice.retry_generation(old)["status"] == "completed"
    alice.delete_generation(wish.tries[-1])
    assert alice.retry_generation(old)["status"] == "queued"


def test_what_has_not_failed_is_not_retried(db, alice, wish):
    wish.asked()
    with unchanged(db), refused("PT409", "not_finished"):
        alice.retry_generation(wish.tries[0])

    wish.completed()
    with unchanged(db), refused("PT409", "already_finished"):
        alice.retry_generation(wish.tries[0])


# The operator's: one picture of each wish, and no more than could be bought.


def test_redrive_queues_what_failed_with_a_code_since_a_time_free_and_once(
    db, alice, service, worker
):
    failed = Wish(db, alice, worker).asked(params={"num_outputs": 2}).failed("result_lost")
    db.pass_time("1 hour")
    Wish(db, alice, worker).asked().failed("moderated")

    assert service.redrive_failed("result_lost", "now") == 0
    assert service.redrive_failed("result_lost", "yesterday") == 1
    assert service.redrive_failed("result_lost", "-infinity") == 0

    job = worker.claimed()
    sent = "select retry_of::text, provider_input from public.generations where id = %s"
    made, old = db.row(sent, job.id), db.row(sent, failed.tries[0])
    assert made == {"retry_of": failed.tries[0], "provider_input": old["provider_input"]}
    worker.complete_job(job, images=2)
    assert alice.credits() == 10
    assert alice.get_job_status(job.id)["price_credits"] == 0
    assert_books_balance(db)


@pytest.mark.parametrize("chain", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0], [0, 1, 0, 2, 1]])
def test_of_a_wish_the_last_try_is_redriven_and_no_other(service, wish, chain):
    wish.user.has(credits=1)
    wish.asked().failed()
    for of in chain:
        wish.again(of).failed()

    assert service.redrive("internal") == {"redriven": 1}

    assert repeats(wish) == [0] * len(chain) + [1]
    assert service.redrive_failed("internal", "-infinity") == 0
    wish.completed()
    assert service.redrive_failed("internal", "-infinity") == 0
    assert wish.user.credits() == 1


@pytest.mark.parametrize("of", [0, 1])
@pytest.mark.parametrize("way", ["queued", "processing", "canceled", "completed", "deleted"])
def test_a_wish_is_not_redriven_while_a_try_of_it_is_under_way_done_or_given_up(
    service, wish, way, of
):
    wish.asked().failed().again(0).failed().again(of)
    if way == "canceled":
        wish.user.cancel_generation(wish.tries[-1])
    elif way == "processing":
        wish.worker.claimed()
    elif way == "completed":
        wish.completed().again(1 - of).failed()  # it is not the last
    elif way == "deleted":
        wish.completed().user.delete_generation(wish.tries[-1])

    assert service.redrive("internal") == {"redriven": 0}


@pytest.mark.parametrize(("deleted", "redriven"), [(0, [0, 0, 1]), (1, [0, 0, 1]), (2, [0, 1, 0])])
def test_of_a_wish_whose_tries_are_deleted_the_last_to_be_seen_counts(
    service, wish, deleted, redriven
):
    wish.asked().failed().again(0).failed().again(1).failed()
    wish.user.delete_generation(wish.tries[deleted])

    assert service.redrive_failed("internal", "-infinity") == 1
    assert repeats(wish) == redriven


def test_nobody_is_given_more_than_the_credits_at_hand_would_have_bought(db, bob, service, wish):
    db.execute("update public.models set price_credits = 4")
    alice, worker = wish.user, wish.worker
    alice.has(credits=16)
    for _ in range(50):
        wish.asked(params={"num_outputs": 4}).failed()
    honest = Wish(db, bob, worker).asked(params={"num_outputs": 2}).failed()

    assert service.redrive("internal") == {
        "redriven": 2,
        "skipped": {"insufficient_credits": 49},
    }
    assert repeats(wish) == [1] + [0] * 49
    assert repeats(honest) == [1]
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


MODEL = "update public.models set"
MAXIMUM = f"{MODEL} input_schema = jsonb_set(input_schema, '{{properties,width,maximum}}', '128')"


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("not_found", f"{MODEL} is_active = false"),
        ("not_found", "delete from public.models where id = 'darkroom/preview'"),
        ("requires_paid_plan", f"{MODEL} requires_paid = true"),
        ("invalid_input", f"{MODEL} client_inputs = array_remove(client_inputs, 'width')"),
        ("invalid_input", f"{MODEL} max_images = 1"),
        ("internal", "alter table private.ready_jobs add check (fair_key is null)"),
    ],
)
def test_what_fits_no_more_is_skipped_and_told(db, service, wish, reason, change):
    wish.asked(params={"width": 512, "num_outputs": 2}).failed()
    db.execute(change)

    with unchanged(db):
        assert service.redrive("internal") == {"redriven": 0, "skipped": {reason: 1}}


def test_one_that_fits_no_more_stops_no_other_and_takes_no_place(db, service, wish):
    for width in (512, 128, 512, 128, 128):
        wish.asked(params={"width": width}).failed()
    db.execute(MAXIMUM)

    answer = service.redrive("internal", at_most=2)

    assert answer == {"redriven": 2, "skipped": {"invalid_input": 2}}
    assert repeats(wish) == [0, 1, 0, 1, 0]
    assert service.redrive("internal", at_most=2)["redriven"] == 1


def test_operators_at_once_redrive_each_wish_once_and_what_is_paused_waits(db, bob, worker, wish):
    for user in (wish.user, bob):
        mine = Wish(db, user, worker)
        for _ in range(3):
            mine.asked().failed().again().failed()
    operators = [Service(db) for _ in range(4)]
    operators[0].pause_model("darkroom/preview")

    answers = together([lambda s=each: s.redrive("internal") for each in operators])

    assert sum(answer["redriven"] for answer in answers) == 6
    assert {key for answer in answers for key in answer} == {"redriven"}
    assert worker.claim_jobs(1) == []
    assert_books_balance(db)
