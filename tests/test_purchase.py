"""sql/74_steps.sql: what keeps a picture from being bought twice, and from becoming another's."""

from __future__ import annotations

from typing import Any

import pytest
from actors import Worker, created, polled, refused, together
from database import assert_books_balance, unchanged
from psycopg.types.json import Jsonb

# How providers that know more, or less, of a lost create are asked, told by the recipes we have.
CLASSES = {
    "key": {"as_of": "comfyui"},
    "find": {"as_of": "replicate"},
    "find, not all": {"as_of": "fal"},
    "unknown": {"as_of": "bfl"},
    "unknown, buys again": {"as_of": "bfl", "buys_again": True},
}
LOOKS = {"key": "poll", "find": "find", "find, not all": "find"}
BLIND = {"find, not all", "unknown"}  # that nothing is found proves nothing


@pytest.fixture
def job(db, alice, worker):
    """A running job of alice's, to be made as at Replicate."""
    db.buys_previews()
    alice.enqueue()
    return worker.claimed()


def claim_again(db, worker):
    """Claim the job after any backoff or lease."""
    db.pass_time("61 seconds")
    worker.recover_stale_jobs()
    db.pass_time("61 seconds")
    return worker.claimed()


def jobs_of(db, user, worker, count):
    """Return that many running jobs, alike, to be made as at Replicate."""
    db.buys_previews()
    db.lift_limits()
    user.has(credits=count)
    for _ in range(count):
        user.enqueue(params={"seed": 7})
    return worker.claim_jobs(count)


def listed(job, *ids, **changes):
    """What Replicate lists of these predictions, of this job's input, newest first."""
    item = {"model": job.provider_ref, "version": "hidden", "input": job.provider_input}
    return {"results": [item | {"id": each} | changes for each in ids], "next": None}


def lose(worker, job):
    """Have the create be sent and never answered; return what to do then."""
    told = worker.next_step(job)
    assert told["step"] == "create"
    return worker.answered(job, told, status=None, error="ReadTimeout")


# What an attempt leaves to the next.

# How an attempt ends, and whether something may have been bought that is not known.
ENDS = {
    "release": True,
    "lease lost": True,
    "provider_timeout": True,
    "internal": True,
    "worker_full": True,
    "storage_unavailable": True,
    "provider_busy": False,
    "provider_error": False,
    "result_lost": False,
    "internal, not asked": False,
    "released before it asked": False,
}


@pytest.mark.parametrize("is_bought", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_the_next_attempt_resumes_and_looks_for_only_what_may_be_alive(
    db, worker, job, end, is_bought
):
    assert job.begun_before is None
    if is_bought:
        worker.checkpoint(job, "bought")
    else:
        assert worker.next_step(job)["step"] == "create"
    code, _, is_asked = end.partition(", ")
    if end.startswith("release"):
        worker.release_job(job, resumes=end == "release")
    elif end != "lease lost":
        worker.fail_job(job, code, metrics={"is_asked": not is_asked})

    again = claim_again(db, worker)

    told = worker.next_step(again)
    resumes = ENDS[end]
    assert again.provider_job_id == ("bought" if resumes and is_bought else None)
    assert told["step"] == (("poll" if is_bought else "find") if resumes else "create")
    assert ("/bought" in told["request"]["url"]) == (resumes and is_bought)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_create_is_told_once_and_then_looked_for_as_its_provider_can_be_asked(
    db, alice, worker, kind
):
    db.buys_previews(**CLASSES[kind])
    alice.enqueue()
    assert worker.next_step(worker.claimed())["step"] == "create"  # and the worker dies

    told = worker.next_step(again := claim_again(db, worker))

    if kind == "unknown":
        assert (told["do"], told["code"]) == ("fail", "outcome_unknown")
        assert worker.fail_job(again, told["code"]) == "failed"
        assert alice.ledger()[-1] == ("refund", 1)
    elif kind == "unknown, buys again":
        assert told["step"] == "create"
    else:
        assert told["step"] == LOOKS[kind]


@pytest.mark.parametrize("kind", CLASSES)
def test_a_worker_that_died_before_it_was_told_to_create_has_bought_nothing(
    db, alice, worker, kind
):
    db.buys_previews(**CLASSES[kind])
    alice.enqueue()
    worker.claimed()  # and it dies

    told = worker.next_step(claim_again(db, worker))

    # Only who can tell for sure is asked: all others were not to be told of a create.
    assert told["step"] == (LOOKS[kind] if kind in ("key", "find") else "create")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_create_without_an_answer_is_never_sent_again_by_the_same_attempt(
    db, alice, worker, kind
):
    db.buys_previews(**CLASSES[kind], settle="0 seconds")
    alice.enqueue()
    told = lose(worker, job := worker.claimed())

    if kind in LOOKS:
        assert told["step"] == LOOKS[kind]
        while told["do"] == "send":  # ComfyUI is asked for what it has made and what it will
            assert told["step"] in ("poll", "find")
            told = worker.answered(job, told, {})
    if kind in BLIND:
        assert (told["do"], told["code"]) == ("fail", "outcome_unknown")
        return
    assert (told["do"], told["code"]) == ("fail", "provider_timeout")
    assert told["reason"].startswith("create: no answer ReadTimeout")
    worker.fail_job(job, told["code"])
    told = worker.next_step(again := claim_again(db, worker))
    while told["do"] == "send" and told["step"] != "create":
        told = worker.answered(again, told, {})
    assert told["step"] == "create"  # it is proven, or the operator pays twice, that none was


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (200, None),
        (201, "<h1>hello</h1>"),
        (200, {"id": {"a": 1}}),
        (200, {"id": "a/../b"}),
        (200, {"id": "x" * 201}),
        (200, {"id": "good", "input": {"image": "https://elsewhere.example/other.png"}}),
        (200, {"id": "anothers"}),
        (408, {}),
        (500, {"id": "good"}),
        (503, None),
        (None, None),
    ],
)
def test_what_is_no_answer_to_this_create_is_looked_for(db, alice, worker, status, body):
    job, other = jobs_of(db, alice, worker, 2)
    worker.checkpoint(other, "anothers")

    told = worker.answered(job, worker.next_step(job), body, status)

    assert (told["do"], told["step"]) == ("send", "find")
    assert db.value("select count(*) from private.purchases") == 1


# Nobody else answers these, and nothing is bought that has to be looked for.
REFUSED = {0: "provider_busy", 429: "provider_busy", 400: "invalid_input", 404: "model_withdrawn"}


@pytest.mark.parametrize("status", REFUSED)
def test_a_refused_create_costs_nothing_and_is_not_looked_for(db, worker, job, status):
    told = worker.answered(job, worker.next_step(job), {}, status)

    assert (told["do"], told["code"]) == ("fail", REFUSED[status])
    assert told["metrics"] == {"is_asked": False}


# Who is refused, the account, or this job, is asked before anybody is told to wait.
@pytest.mark.parametrize("is_bought", [False, True])
@pytest.mark.parametrize(
    ("answers", "do", "is_sure"),
    [
        ([401, 401], "pause", True),
        ([402, 200], "pause", False),
        ([401, None], "pause", False),
        ([403, 403], "pause", True),
        ([403, 200], "fail", False),
        ([403, 500], "fail", False),
    ],
)
def test_a_refusal_is_the_accounts_or_the_jobs_and_forgets_no_purchase(
    request, is_bought, answers, do, is_sure
):
    worker, job = (request.getfixturevalue(name) for name in ("worker", "job"))
    if is_bought:
        worker.checkpoint(job, "bought")

    told = worker.answered(job, worker.next_step(job), {"detail": "no"}, answers[0])
    assert (told["step"], told["request"]["url"][-8:]) == ("account", "/account")
    told = worker.answered(job, told, {}, answers[1])

    assert (told["do"], told["is_sure"], told["may_have_bought"]) == (do, is_sure, is_bought)
    assert (told["code"], told["detail"]) == ("provider_refused", "no")


# What is taken over.


def test_the_oldest_that_nobody_has_is_taken_over_and_resumed(db, alice, worker):
    mine, running, done, waiting = jobs_of(db, alice, worker, 4)
    worker.checkpoint(running, "running")
    worker.checkpoint(done, "done")
    worker.complete_job(done)
    worker.checkpoint(waiting, "waiting")
    worker.fail_job(waiting, "internal", retry_after=3600)
    taken = ["waiting", "running", "done"]
    told = lose(worker, mine)
    with unchanged(db):
        told = worker.answered(mine, told, listed(mine, *taken))
    assert (told["step"], told["is_found"]) == ("find", None)

    told = worker.answered(mine, told, found := listed(mine, "lost-2", "lost-1", *taken))

    assert (told["step"], told["is_found"]) == ("poll", True)
    assert told["request"]["url"].endswith("/lost-1")
    assert told["cancel"][0]["url"].endswith("/lost-1/cancel")
    with unchanged(db):  # the answer was lost, and the worker says it once more
        assert worker.answered(mine, told | {"step": "find"}, found)["step"] == "poll"
    worker.release_job(mine)
    assert worker.claimed().provider_job_id == "lost-1"
    assert_books_balance(db)


@pytest.mark.parametrize(
    "changes",
    [
        {"input": {"prompt": "a lighthouse at dusk"}},
        {"input": None},
        {"model": "darkroom/another"},
        {"version": "0" * 64},
        {"id": "a b"},
        {"id": {}},
    ],
)
def test_without_proof_nothing_is_taken_over(db, worker, job, changes):
    told = worker.answered(job, lose(worker, job), listed(job, "lost", **changes))

    assert told["step"] == "find"
    assert db.value("select count(*) from private.purchases") == 0


def test_jobs_that_look_alike_never_take_over_the_same(db, alice, worker):
    jobs = jobs_of(db, alice, worker, 12)
    workers = [Worker(db) for _ in jobs]
    lost = [lose(worker, job) for job in jobs]
    found = listed(jobs[0], *(f"lost-{number}" for number in range(8)))

    told = together(
        [
            lambda w=w, job=job, told=told: w.answered(job, told, found)
            for w, job, told in zip(workers, jobs, lost, strict=True)
        ]
    )

    assert [each["step"] for each in told].count("poll") == 8
    ids = db.value("select array_agg(provider_job_id) from private.running_jobs")
    assert sorted(each for each in ids if each) == [f"lost-{number}" for number in range(8)]


WHEREABOUTS = {
    "running": lambda worker, job: None,
    "waiting": lambda worker, job: worker.release_job(job),
    "retried from the start": lambda worker, job: worker.fail_job(job, "provider_error"),
    "failed": lambda worker, job: worker.fail_job(job, "moderated"),
    "done": lambda worker, job: worker.complete_job(job),
}


@pytest.mark.parametrize("whereabouts", WHEREABOUTS)
def test_what_a_job_has_bought_is_never_anothers(db, alice, worker, whereabouts):
    mine, other = jobs_of(db, alice, worker, 2)
    worker.checkpoint(other, "bought")
    WHEREABOUTS[whereabouts](worker, other)
    db.execute("delete from private.attempts")  # as retention does one day

    told = worker.answered(mine, worker.next_step(mine), {"id": "bought"})
    assert told["step"] == "find"
    told = worker.answered(mine, told, listed(mine, "bought"))

    assert told["step"] == "find"
    assert db.value("select count(*) from private.purchases") == 1
    assert (
        db.value("select provider_job_id from private.running_jobs where job_id = %s", mine.id)
        is None
    )


def test_in_one_call_two_jobs_with_one_answer_get_it_once(db, alice, worker):
    jobs = jobs_of(db, alice, worker, 2)
    for job in jobs:
        worker.next_step(job)

    told = worker.of_many("next_steps", [(job, Jsonb(created("one"))) for job in jobs])

    assert sorted(step["step"] for _, step in told) == ["find", "poll"]


# Sources: their addresses are made anew each time.


@pytest.fixture
def with_source(db, alice, worker):
    """A running job of alice's with a source, to be made as at Replicate."""
    db.buys_previews()
    db.execute(
        "insert into storage.objects (bucket_id, name, metadata) values ('inputs', %s, %s)",
        path := f"{alice.id}/a.png",
        Jsonb({"size": 9, "mimetype": "image/png"}),
    )
    alice.enqueue(params={"image": path})
    return worker.claimed()


def test_what_was_sent_with_addresses_of_sources_is_looked_for_by_them(db, worker, with_source):
    told = worker.next_step(with_source)
    assert (told["do"], told["upload"]["method"]) == ("sources", "POST")
    sent = with_source.provider_input | {"image": "https://storage.example/a.png?token=1"}
    told = worker.next_step(with_source, {"step": "sources", "input": sent})
    assert told["request"]["body"]["input"] == sent

    told = worker.next_step(again := claim_again(db, worker))  # it died

    assert told["step"] == "find"
    told = worker.answered(again, told, listed(again, "by-path"))
    assert told["step"] == "find"  # that is what nobody has sent
    told = worker.answered(again, told, listed(again, "by-address", input=sent))
    assert told["request"]["url"].endswith("/by-address")


def test_a_source_that_was_not_handed_over_was_not_bought_with(db, worker, with_source):
    assert worker.next_step(with_source)["do"] == "sources"

    again = claim_again(db, worker)

    assert worker.next_step(again)["do"] == "sources"
    without_address = {"step": "upload", "memo": {}, "status": 200, "body": {"urls": 7}}
    told = worker.next_step(again, without_address)
    assert (told["do"], told["code"]) == ("fail", "provider_error")


# Looking.


def test_a_list_is_read_to_its_end_and_wherever_it_leads_the_provider_is_asked(db, worker, job):
    told = lose(worker, job)
    home = told["request"]["url"].partition("?")[0]
    for cursor in ("https://elsewhere.example/x?cursor=a", "/predictions?cursor=b", "?cursor=c"):
        told = worker.answered(job, told, {"results": [], "next": cursor})
        assert (told["step"], told["wait"]) == ("find", 0)
        assert told["request"]["url"] == f"{home}?{cursor.partition('?')[2]}"

    told = worker.answered(job, told, listed(job, "lost"))

    assert told["request"]["url"] == f"{home}/lost"


def test_a_list_without_an_end_ends_the_job_and_nothing_else(db, worker, job):
    told, pages = lose(worker, job), 0
    while told["do"] == "send":
        told = worker.answered(job, told, {"results": [], "next": "?cursor=a"})
        pages += 1

    assert (told["do"], told["code"], pages) == ("fail", "timeout", 50)


def test_a_lost_create_has_time_to_show(db, worker, job):
    told, waits = lose(worker, job), []
    for _ in range(6):
        told = worker.answered(job, told, listed(job))
        waits.append(told["wait"])

    assert (told["step"], waits) == ("find", [0.25, 0.5, 1, 2, 4, 8])
    db.execute("update private.providers set settle = '0'")
    told["memo"]["until"] = "2020-01-01"
    told = worker.answered(job, told, listed(job))
    assert (told["do"], told["code"]) == ("fail", "provider_timeout")


def test_what_fal_shows_is_followed_where_it_is(db, alice, worker):
    db.buys_previews("fal")
    db.execute(
        "update public.models set provider_ref = 'fal-ai/flux/dev' where provider = 'preview'"
    )
    alice.enqueue()
    told = lose(worker, job := worker.claimed())

    found = {"items": [{"request_id": "lost", "json_input": job.provider_input}]}
    told = worker.answered(job, told, found)

    of_it = "https://queue.fal.run/fal-ai/flux/requests/lost"
    assert told["request"]["url"] == f"{of_it}/status?logs=1"
    assert [each["url"] for each in told["cancel"]] == [f"{of_it}/cancel"]
    told = worker.answered(job, told, {"request_id": "lost", "status": "COMPLETED"})
    assert told["request"]["url"] == of_it


# ComfyUI: we name the job.


@pytest.fixture
def graph(db, alice, worker):
    """A running job of alice's, to be made by ComfyUI, and its name there."""
    db.buys_previews("comfyui", settle="1 minute")
    alice.enqueue()
    job = worker.claimed()
    told = worker.next_step(job)
    return job, told["request"]["body"]["prompt_id"], told


QUEUES: dict[str, dict[str, Any]] = {
    "waiting": {"queue_running": [[1, "another"]], "queue_pending": [[2, "{key}"]]},
    "under way": {"queue_running": [[2, "{key}"]], "queue_pending": []},
}


@pytest.mark.parametrize("place", QUEUES)
def test_what_is_alive_in_comfyuis_queue_is_the_jobs_by_its_key(db, worker, graph, place):
    job, key, told = graph
    told = worker.answered(job, told, status=None)
    assert told["request"]["url"].endswith(f"/history/{key}")
    told = worker.answered(job, told, {})  # not in its history
    assert told["request"]["url"].endswith("/queue")

    queue = {k: [[n, i.format(key=key)] for n, i in v] for k, v in QUEUES[place].items()}
    told = worker.answered(job, told, queue)

    assert told["request"]["url"].endswith(f"/history/{key}")
    worker.release_job(job)
    assert worker.claimed().provider_job_id == key


def test_what_ends_between_two_looks_is_not_lost(db, worker, graph):
    job, key, told = graph
    told = worker.answered(job, told, {"prompt_id": key})
    for _ in range(20):  # it takes its time
        told = worker.answered(job, told, {})
        told = worker.answered(job, told, {"queue_running": [[1, key]], "queue_pending": []})
    told = worker.answered(job, told, {})

    told = worker.answered(job, told, {"queue_running": [], "queue_pending": []})

    assert told["step"] == "poll"
    picture = {"filename": "a b.png", "subfolder": "", "type": "output"}
    ended = {"status": {"status_str": "success"}, "outputs": {"9": {"images": [picture]}}}
    told = worker.answered(job, told, {key: ended})
    view = "http://127.0.0.1:8188/view?filename=a%20b.png&subfolder=&type=output"
    assert (told["do"], told["outputs"]) == ("store", [view])


def test_what_is_in_neither_place_for_long_is_lost_and_made_under_another_name(db, worker, graph):
    job, key, told = graph
    told = worker.answered(job, told, {"prompt_id": key})
    while told["do"] == "send":
        told = worker.answered(job, told, {})
    assert (told["do"], told["code"]) == ("fail", "result_lost")
    worker.fail_job(job, told["code"])

    told = worker.next_step(claim_again(db, worker))

    assert told["step"] == "create"
    assert told["request"]["body"]["prompt_id"] not in (None, key)


def test_an_answer_with_anothers_name_is_asked_for_by_ours(db, alice, worker, graph):
    job, key, told = graph
    db.execute("insert into private.purchases values (%s, 'anothers')", alice.enqueued())

    told = worker.answered(job, told, {"prompt_id": "anothers"})

    assert told["request"]["url"].endswith(f"/history/{key}")


# Following.


def test_a_single_look_that_misses_it_proves_nothing(db, worker, job):
    worker.checkpoint(job, "bought")
    told = worker.next_step(job)
    for _ in range(20):
        told = worker.answered(job, told, polled("bought", "processing")["body"])

    for _ in range(4):
        told = worker.answered(job, told, {}, 404)
        assert told["step"] == "poll"
    told = worker.answered(job, told, {}, 404)

    assert (told["do"], told["code"]) == ("fail", "result_lost")


@pytest.mark.parametrize("status", [None, 0, 400, 409, 410, 422, 429, 500, 503])
def test_what_was_bought_is_asked_for_again_whatever_is_answered(db, worker, job, status):
    worker.checkpoint(job, "bought")

    told = worker.answered(job, worker.next_step(job), {}, status)

    assert (told["step"], told["wait"]) == ("poll", 0.5)
    assert told["request"]["url"].endswith("/bought")


def test_the_answer_to_anothers_question_is_none(db, worker, job):
    worker.checkpoint(job, "bought")
    done = polled("anothers", "succeeded", output="https://replicate.delivery/a.png")["body"]

    assert worker.answered(job, worker.next_step(job), done)["step"] == "poll"


def test_a_job_whose_user_is_gone_is_stopped_by_what_its_create_answers(db, alice, worker, job):
    worker.next_step(job)
    db.execute("delete from auth.users where id = %s", alice.id)

    answer = created("bought") | {"provider": "preview"}
    ((_, told),) = worker.of_many("next_steps", [(job, Jsonb(answer))])

    assert (told["do"], told["cancel"][0]["url"][-14:]) == ("drop", "/bought/cancel")
    with refused("DR001"):
        worker.next_step(job, answer | {"status": 429})


@pytest.mark.parametrize("what", ["model", "recipe"])
def test_a_job_that_nobody_can_make_any_more_fails_by_itself(db, worker, job, what):
    db.execute(
        "delete from public.models where provider = 'preview'"
        if what == "model"
        else "update private.providers set recipe = null where name = 'preview'"
    )

    told = worker.next_step(job)

    assert (told["do"], told["code"]) == ("fail", "internal")


def test_what_a_create_says_that_it_costs_is_known_at_once_and_at_the_end(db, alice, worker):
    db.buys_previews("bfl")
    alice.enqueue()
    told = worker.next_step(job := worker.claimed())
    look = "https://api.eu.bfl.ai/v1/get_result?id=bought"

    told = worker.answered(job, told, {"id": "bought", "cost": 4, "polling_url": look})

    assert (told["metrics"], told["request"]["url"]) == ({"cost_usd": 0.04}, look)
    done = {"id": "bought", "status": "Ready", "result": {"sample": "https://a.example/a.png"}}
    told = worker.answered(job, told, done)
    assert told["metrics"] == {"cost_usd": 0.04, "images": 1}
