"""The example app in a real browser, against the real stack and real workers."""

import json
import re
import statistics

import pytest
from app_page import API, App
from PIL import Image
from playwright.sync_api import expect
from worker_process import eventually

from stack import sign_jwt

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
REFUSED = "a fox in the snow [fail:moderated]"


def test_the_picture_takes_the_place_of_its_placeholder_and_opens(alice, workers, report_time):
    workers.start(PREVIEW_SECONDS=1)
    alice.shot("empty")
    alice.ask(LIGHTHOUSE)
    alice.until(LIGHTHOUSE, "queued")
    before = alice.place(LIGHTHOUSE)
    alice.shot("queued")

    drawn_at = alice.until_drawn(LIGHTHOUSE)
    late = drawn_at - alice.jobs()[0]["finished_at"].timestamp()

    report_time("from the end of a job to its picture, without Realtime", late * 1000)
    assert late < 2
    assert alice.place(LIGHTHOUSE) == before
    assert alice.credits() == 9
    alice.press("Open: ")
    full = alice.page.locator('[aria-modal="true"] img[src^="blob:"]')
    eventually(lambda: full.first.evaluate("image => image.naturalWidth") == 1024)
    alice.shot("viewer")


def test_a_gallery_fills_from_the_top(alice, workers):
    workers.start()
    prompts = ["a fox in the snow", "a city in the rain, neon", "a bowl of plums", LIGHTHOUSE]
    for prompt in prompts:
        alice.ask(prompt)
        alice.until_drawn(prompt)

    tops = [alice.place(prompt) for prompt in reversed(prompts)]

    assert tops == sorted(tops, key=lambda place: (place["y"], place["x"]))
    alice.shot("completed")


def test_a_picture_may_start_from_one_that_was_picked(alice, workers, tmp_path):
    picked = tmp_path / "lawn.png"
    Image.new("RGB", (300, 200), (0, 255, 0)).save(picked)
    workers.start()
    with alice.page.expect_file_chooser() as chooser:
        alice.press("Start from a picture")
    chooser.value.set_files(picked)
    expect(alice.page.get_by_text("Starts from your picture")).to_be_visible()

    alice.ask(LIGHTHOUSE)

    alice.until_drawn(LIGHTHOUSE)
    (job,) = alice.jobs()
    assert job["input"]["image"] == f"{alice.user_id}/{job['idempotency_key']}"


@pytest.mark.parametrize("network", ["good", "cut"])
def test_the_placeholder_is_there_at_once(alice, report_time, network):
    if network == "cut":
        alice.cut()

    times = [alice.milliseconds_to_card(f"number {number}") for number in range(5)]

    for milliseconds in times:
        report_time(f"from the press to the placeholder, {network}", milliseconds)
    assert statistics.median(times) < 50
    alice.heal()


def test_credits_drop_before_the_answer_and_come_back_with_a_refusal(alice, operator):
    spent = {"amount": -10, "kind": "adjust", "external_id": alice.email}
    assert operator.rpc("grant_credits", user_id=alice.user_id, **spent).is_success
    alice.slow_3g()

    alice.ask(LIGHTHOUSE)

    assert alice.credits() == 9
    expect(alice.until(LIGHTHOUSE, "refused")).to_contain_text("Not enough credits")
    alice.show()  # reads all anew
    alice.until_credits(0)
    alice.shot("refused")
    assert alice.jobs() == []


def test_a_failed_one_tells_why_and_gives_the_credit_back_on_a_phone_too(alice, workers):
    workers.start(PREVIEW_SECONDS=0.5)
    alice.ask(REFUSED)

    card = alice.until(REFUSED, "failed")

    expect(card).to_contain_text("The safety filter refused this picture")
    expect(card).to_contain_text("1 credit given back")
    alice.until_credits(10)
    alice.shot("failed")
    alice.page.set_viewport_size({"width": 390, "height": 844})
    alice.shot("phone")
    assert alice.page.evaluate("document.documentElement.scrollWidth") == 390
    alice.press("Try again", card)
    eventually(lambda: [job["status"] for job in alice.jobs()] == ["failed"] * 2)
    assert alice.jobs()[1]["retry_of"] == alice.jobs()[0]["id"]


def test_a_running_one_shows_its_progress_and_can_be_canceled(alice, workers):
    workers.start(PREVIEW_SECONDS=20)
    alice.ask(LIGHTHOUSE)
    card = alice.until(LIGHTHOUSE, "processing")
    expect(card).to_contain_text(re.compile(r"Developing [1-9]0 %"), timeout=15_000)
    alice.shot("developing")

    alice.press("Cancel", card)

    expect(alice.until(LIGHTHOUSE, "canceled")).to_contain_text("1 credit given back")
    alice.until_credits(10)
    alice.shot("canceled")


@pytest.mark.parametrize("backend_is", ["refusing", "silent"])
def test_a_first_launch_does_not_wait_for_the_backend(app, backend_is, report_time):
    if backend_is == "refusing":
        app.cut()
    else:
        app.page.route(API, lambda route: None)

    app.open()

    expect(app.page.get_by_role("button", name="Sign in")).to_be_visible()
    painted = app.first_paint()
    report_time(f"first paint, backend {backend_is}", painted)
    assert painted < 1000
    app.shot("sign-in")
    app.heal()


def test_without_a_backend_the_gallery_is_there_and_wishes_are_kept(alice, stack, workers):
    worker = workers.start()
    alice.ask(LIGHTHOUSE)
    alice.until_drawn(LIGHTHOUSE)
    alice.wait(0.5)  # what is shown is on the device a moment later
    worker.stop()
    stack.gateway.stop()
    try:
        alice.forget_http_cache()
        alice.open()
        alice.until_drawn(LIGHTHOUSE)
        expect(alice.is_offline()).to_be_visible()
        alice.ask("a fox in the snow")
        alice.until("a fox in the snow", "waiting")
        alice.shot("offline")
        alice.open()  # and killed, too
        alice.until("a fox in the snow", "waiting")
    finally:
        stack.up()

    workers.start()
    alice.until_drawn("a fox in the snow")
    expect(alice.is_offline()).not_to_be_visible()
    assert len(alice.jobs()) == 2


def test_twenty_double_clicks_without_an_answer_are_one_job_and_one_charge(alice, workers):
    alice.write(LIGHTHOUSE)
    alice.lose_answers()
    for _ in range(20):
        alice.page.get_by_role("button", name="Generate").dblclick()
    eventually(alice.jobs)
    alice.heal()
    workers.start()

    alice.until_drawn(LIGHTHOUSE)

    assert alice.ledger() == [("grant", 10), ("charge", -1)]
    assert len(alice.jobs()) == alice.card(LIGHTHOUSE).count() == 1
    assert alice.credits() == 9


def test_the_card_outlives_a_killed_worker(alice, workers):
    worker = workers.start(PREVIEW_SECONDS=60)
    alice.ask(LIGHTHOUSE)
    alice.until(LIGHTHOUSE, "processing")
    before = alice.place(LIGHTHOUSE)

    worker.kill()
    workers.backdate_leases()
    workers.start()

    alice.until_drawn(LIGHTHOUSE)
    assert alice.place(LIGHTHOUSE) == before
    assert alice.ledger() == [("grant", 10), ("charge", -1)]


def test_a_wish_kept_in_one_tab_is_sent_by_another_and_done_once(alice, workers):
    alice.cut()
    alice.ask(LIGHTHOUSE)
    alice.until(LIGHTHOUSE, "waiting")
    other = App(alice.page.context.new_page(), alice.db)
    other.open()
    other.until(LIGHTHOUSE, "queued")
    alice.heal()
    workers.start()

    alice.until_drawn(LIGHTHOUSE)
    other.until_drawn(LIGHTHOUSE)

    assert len(alice.jobs()) == 1
    assert alice.card(LIGHTHOUSE).count() == other.card(LIGHTHOUSE).count() == 1


def test_a_hidden_app_asks_for_nothing_until_it_comes_to_the_front(alice, workers):
    alice.ask(LIGHTHOUSE)
    alice.until(LIGHTHOUSE, "queued")
    alice.hide()
    alice.wait(0.5)  # what is under way ends
    before = len(alice.requests)
    workers.start()
    workers.until(str(alice.jobs()[0]["id"]), "completed")
    alice.wait(4)

    assert alice.requests[before:] == []
    alice.show()
    alice.until_drawn(LIGHTHOUSE)


def test_an_expired_session_is_renewed_and_the_call_repeated(alice, stack, workers):
    workers.start()
    claims = {"sub": alice.user_id, "role": "authenticated", "exp": 1_000_000_000}
    alice.page.evaluate(
        "token => { localStorage.session ="
        " JSON.stringify({...JSON.parse(localStorage.session), access_token: token}) }",
        sign_jwt(stack.jwt_secret, claims),
    )

    alice.ask(LIGHTHOUSE)

    alice.until_drawn(LIGHTHOUSE)
    assert len(alice.jobs()) == 1


def test_the_history_is_read_page_by_page(alice):
    alice.db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input, status,"
        " price_credits, image_count, finished_at, error_code, error_message)"
        " select %s, 'darkroom/preview', 'number ' || n, '{}', '{}', 'failed', 0, 1, now(),"
        " 'internal', 'Something went wrong on our side.' from generate_series(1, 50) as n",
        alice.user_id,
    )
    last = alice.card("number 1").filter(has_text=re.compile("number 1$"))
    alice.open()
    alice.until("number 50", "failed")
    assert last.count() == 0

    def scrolled_to_the_end() -> bool:
        alice.page.mouse.wheel(0, 1500)
        alice.wait(0.1)
        return last.is_visible()

    eventually(scrolled_to_the_end, within=30)


@pytest.mark.parametrize("killed", ["not at all", "before the session is gone", "after it"])
def test_a_sign_out_leaves_nothing_of_the_user_on_the_device(alice, workers, killed):
    workers.start()
    alice.ask(LIGHTHOUSE)
    alice.until_drawn(LIGHTHOUSE)
    match killed:
        case "not at all":
            alice.press("Sign out")
        case "after it":
            alice.page.evaluate("delete localStorage.session")
        case _:
            expires = "{...JSON.parse(localStorage.session), expires_at: 1}"  # so it is renewed
            alice.page.evaluate(f"localStorage.session = JSON.stringify({expires})")
            alice.page.route(API, lambda _: None)  # for ever
            alice.press("Sign out")
            alice.wait(0.1)
            alice.heal()
    if killed != "not at all":
        alice.cut()
        alice.open()

    expect(alice.page.get_by_role("button", name="Sign in")).to_be_visible()
    assert alice.card(LIGHTHOUSE).count() == 0
    left = "JSON.stringify(localStorage)"
    eventually(lambda: alice.wait(0.1) or alice.page.evaluate(left) == "{}", within=60)
    assert alice.page.evaluate("caches.keys()") == []


def test_a_hint_is_followed_by_a_read_long_before_the_poll(app):
    sockets = []

    def serve(socket):
        """Answer a Realtime client as Supabase does."""

        def on_message(text):
            join, ref, topic, event, _ = json.loads(text)
            reply = {"status": "ok", "response": {}}
            socket.send(json.dumps([join, ref, topic, "phx_reply", reply]))
            if event == "phx_join" and topic.startswith("realtime:user:"):
                sockets.append((socket, join, topic))

        socket.on_message(on_message)

    app.page.route_web_socket(re.compile("/realtime/v1/websocket"), serve)
    app.open()
    app.sign_up()
    app.ask(LIGHTHOUSE)
    app.until(LIGHTHOUSE, "queued")
    eventually(lambda: app.wait(0.05) or sockets)
    app.db.execute(
        "update public.generations set created_at = now() - interval '1 hour' where user_id = %s",
        app.user_id,
    )  # so it is polled every ten seconds
    app.wait(3)
    before = len(app.requests)
    app.wait(2)
    assert app.requests[before:] == []

    socket, join, topic = sockets[-1]
    payload = {"job_id": str(app.jobs()[0]["id"]), "status": "processing"}
    hint = {"type": "broadcast", "event": "generation", "payload": payload}
    socket.send(json.dumps([join, None, topic, "broadcast", hint]))

    eventually(lambda: app.wait(0.02) or app.requests[before:], within=2)
    assert "rpc/list_active_jobs" in app.requests[before]
