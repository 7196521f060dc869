"""The example app in a real browser, against the real stack and real workers."""

import re
import statistics
import time

from app_page import API, SET_VISIBILITY, App
from playwright.sync_api import expect
from worker_process import eventually

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
REFUSED = "a fox in the snow [fail:moderated]"


def test_pictures_take_the_place_of_their_placeholders_from_the_top_and_open(alice, workers):
    workers.start(PREVIEW_SECONDS=1)
    prompts = ["a fox in the snow", "a city in the rain, neon", "a bowl of plums", LIGHTHOUSE]
    for prompt in prompts:
        alice.ask(prompt)
        alice.until(prompt, "queued")
        before = alice.place(prompt)

        alice.until_drawn(prompt)

        assert time.time() - alice.jobs()[-1]["finished_at"].timestamp() < 2  # without Realtime
        assert alice.place(prompt) == before
    tops = [alice.place(prompt) for prompt in reversed(prompts)]
    assert tops == sorted(tops, key=lambda place: (place["y"], place["x"]))
    alice.until_credits(6)
    alice.press(f"Open: {LIGHTHOUSE}")
    full = alice.page.locator('[aria-modal="true"] img[src^="blob:"]')
    eventually(lambda: full.first.evaluate("image => image.naturalWidth") == 1024)


def test_the_placeholder_is_there_at_once_also_without_a_network(alice):
    alice.cut()

    times = [alice.milliseconds_to_card(f"number {number}") for number in range(5)]

    assert statistics.median(times) < 50
    alice.heal()


def test_credits_drop_before_the_answer_and_come_back_with_a_refusal(alice, operator):
    spent = {"amount": -10, "kind": "adjust", "external_id": alice.email}
    assert operator.rpc("grant_credits", user_id=alice.user_id, **spent).is_success
    slowly = {"offline": False, "latency": 2000, "downloadThroughput": -1, "uploadThroughput": -1}
    session = alice.page.context.new_cdp_session(alice.page)
    session.send("Network.emulateNetworkConditions", slowly)

    alice.ask(LIGHTHOUSE)

    alice.until_credits(9)
    expect(alice.until(LIGHTHOUSE, "refused")).to_contain_text("Not enough credits")
    alice.page.evaluate(SET_VISIBILITY, "visible")  # reads all anew
    alice.until_credits(0)
    assert alice.jobs() == []


def test_a_failed_one_tells_why_and_gives_the_credit_back_on_a_phone_too(alice, workers):
    workers.start(PREVIEW_SECONDS=0.5)
    alice.ask(REFUSED)

    card = alice.until(REFUSED, "failed")

    expect(card).to_contain_text("The safety filter refused this picture")
    expect(card).to_contain_text("1 credit given back")
    alice.until_credits(10)
    alice.page.set_viewport_size({"width": 390, "height": 844})
    assert alice.page.evaluate("document.documentElement.scrollWidth") == 390
    alice.press("Try again", card)
    eventually(lambda: [job["status"] for job in alice.jobs()] == ["failed"] * 2)
    assert alice.jobs()[1]["retry_of"] == alice.jobs()[0]["id"]


def test_a_running_one_shows_its_progress_and_can_be_canceled(alice, workers):
    workers.start(PREVIEW_SECONDS=20)
    alice.ask(LIGHTHOUSE)
    card = alice.until(LIGHTHOUSE, "processing")
    expect(card).to_contain_text(re.compile(r"Developing [1-9]0 %"), timeout=15_000)

    alice.press("Cancel", card)

    expect(alice.until(LIGHTHOUSE, "canceled")).to_contain_text("1 credit given back")
    alice.until_credits(10)


def test_a_first_launch_does_not_wait_for_the_backend(app):
    app.page.route(API, lambda route: None)  # it never answers

    app.open()

    expect(app.page.get_by_role("button", name="Sign in")).to_be_visible()
    painted = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"
    assert eventually(lambda: app.page.evaluate(painted)) < 1000
    app.heal()


def test_without_a_backend_the_gallery_is_there_and_wishes_are_kept(alice, stack, workers):
    worker = workers.start()
    alice.ask(LIGHTHOUSE)
    alice.until_drawn(LIGHTHOUSE)
    alice.wait(0.5)  # what is shown is on the device a moment later
    worker.stop()
    stack.gateway.stop()
    try:
        session = alice.page.context.new_cdp_session(alice.page)
        session.send("Network.clearBrowserCache")  # as of a server of another origin
        alice.open()
        alice.until_drawn(LIGHTHOUSE)
        expect(alice.page.get_by_test_id("offline")).to_be_visible()
        alice.ask("a fox in the snow")
        alice.until("a fox in the snow", "waiting")
        alice.open()  # and killed, too
        alice.until("a fox in the snow", "waiting")
    finally:
        stack.up()

    workers.start()
    alice.until_drawn("a fox in the snow")
    expect(alice.page.get_by_test_id("offline")).not_to_be_visible()
    assert len(alice.jobs()) == 2


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


def test_a_sign_out_that_is_killed_leaves_nothing_of_the_user_on_the_device(alice, workers):
    workers.start()
    alice.ask(LIGHTHOUSE)
    alice.until_drawn(LIGHTHOUSE)
    expires = "{...JSON.parse(localStorage.session), expires_at: 1}"  # so it is renewed first
    alice.page.evaluate(f"localStorage.session = JSON.stringify({expires})")
    alice.page.route(API, lambda _: None)  # for ever
    alice.press("Sign out")
    alice.wait(0.1)
    alice.heal()
    alice.cut()
    alice.open()

    expect(alice.page.get_by_role("button", name="Sign in")).to_be_visible()
    assert alice.card(LIGHTHOUSE).count() == 0
    left = "JSON.stringify(localStorage)"
    eventually(lambda: alice.wait(0.1) or alice.page.evaluate(left) == "{}", within=60)
    assert alice.page.evaluate("caches.keys()") == []
