"""Cards and the picture over them: shapes, what waits, what failed, and what is done with pictures.

SCREENSHOTS=folder keeps what was seen.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import httpx
import pytest
from app_page import PHONE, App
from PIL import Image
from playwright.sync_api import Locator, expect
from worker_process import eventually

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
FOX = "a fox in the snow"
REFUSED = "a city in the rain [fail:moderated]"
AHEAD = "const now = Date.now; Date.now = () => now() + 300_000;"  # the device's clock is wrong
SWAY = """card => {
  const layers = [...card.querySelectorAll('div')].filter(each => each.style.transform);
  return layers.map(({style}) => style.transform).join();
}"""


def ask(app: App, prompt: str, shape: str) -> None:
    app.press(shape)
    app.ask(prompt)


def dialog(app: App) -> Locator:
    return app.page.get_by_role("dialog")


def open_picture(app: App, prompt: str) -> Locator:
    app.press(f"Open: {prompt}")
    expect(dialog(app)).to_be_visible()
    return dialog(app)


def is_open(app: App, prompt: str) -> None:
    expect(dialog(app).get_by_role("heading")).to_have_text(prompt)


@pytest.fixture
def pictures(alice, workers):
    """Two pictures: a fox, and before it a lighthouse."""
    workers.start(PREVIEW_SECONDS=0.2)
    for prompt, shape in ((LIGHTHOUSE, "Portrait"), (FOX, "Landscape")):
        ask(alice, prompt, shape)
        alice.until_drawn(prompt)
    return alice


@pytest.mark.parametrize(
    ("shape", "ratio"), [("Portrait", 832 / 1216), ("Landscape", 1216 / 832), ("Square", 1)]
)
def test_a_tile_has_the_shape_of_its_picture_before_there_is_one(alice, workers, shape, ratio):
    ask(alice, LIGHTHOUSE, shape)
    card = alice.until(LIGHTHOUSE, "queued")
    tray = card.locator("> div").first.bounding_box()
    assert tray
    assert tray["width"] / tray["height"] == pytest.approx(ratio, rel=0.01)
    before = alice.place(LIGHTHOUSE)

    workers.start(PREVIEW_SECONDS=0.2)
    alice.until_drawn(LIGHTHOUSE)

    assert alice.place(LIGHTHOUSE) == before


def test_what_waits_moves_unless_less_motion_is_wanted(alice):
    alice.ask(LIGHTHOUSE)
    card = alice.until(LIGHTHOUSE, "queued")
    first = card.evaluate(SWAY)
    assert first
    eventually(lambda: card.evaluate(SWAY) != first)

    alice.page.emulate_media(reduced_motion="reduce")
    alice.wait(0.2)

    still = card.evaluate(SWAY)
    alice.wait(0.5)
    assert card.evaluate(SWAY) == still


def test_after_a_minute_of_the_server_it_takes_longer_than_usual(app):
    app.page.add_init_script(AHEAD)
    app.open()
    app.sign_up()
    app.ask(LIGHTHOUSE)
    card = app.until(LIGHTHOUSE, "queued")
    late = card.get_by_text("Taking longer than usual")
    app.wait(1)
    expect(late).to_have_count(0)

    ago = (
        "update public.generations set created_at = created_at - interval '61 s' where user_id = %s"
    )
    app.db.execute(ago, app.user_id)

    expect(late).to_be_visible(timeout=15_000)
    app.shot("late")


def test_what_failed_can_be_changed_taken_away_and_brought_back(alice, workers):
    workers.start(PREVIEW_SECONDS=0.2)
    ask(alice, REFUSED, "Landscape")
    card = alice.until(REFUSED, "failed")
    expect(card).to_contain_text("1 credit given back")
    alice.write("something else")

    alice.press("Edit prompt", card)

    expect(alice.page.get_by_label("Prompt")).to_have_value(REFUSED)
    expect(alice.page.get_by_label("Prompt")).to_be_focused()
    alice.press("Remove", card)
    expect(alice.card(REFUSED)).to_have_count(0)
    eventually(lambda: alice.jobs()[0]["deleted_at"] is not None)
    alice.press("Undo")
    alice.until(REFUSED, "failed")
    assert alice.jobs()[0]["deleted_at"] is None


def test_what_was_refused_is_taken_away_for_good(alice, operator):
    spent = {"amount": -10, "kind": "adjust", "external_id": alice.email}
    assert operator.rpc("grant_credits", user_id=alice.user_id, **spent).is_success
    alice.ask(LIGHTHOUSE)

    alice.press("Remove", alice.until(LIGHTHOUSE, "refused"))

    expect(alice.card(LIGHTHOUSE)).to_have_count(0)
    alice.wait(0.5)
    alice.open()
    expect(alice.page.get_by_text("Darkroom")).to_be_visible()
    alice.wait(0.5)
    assert alice.card(LIGHTHOUSE).count() == 0


def test_a_picture_is_deleted_and_the_deletion_taken_back(pictures):
    alice = pictures
    alice.press("Delete", open_picture(alice, LIGHTHOUSE))

    expect(dialog(alice)).to_have_count(0)
    expect(alice.card(LIGHTHOUSE)).to_have_count(0)
    eventually(lambda: alice.jobs()[0]["deleted_at"] is not None)
    alice.press("Undo")

    alice.until_drawn(LIGHTHOUSE)
    places = [alice.place(prompt) for prompt in (FOX, LIGHTHOUSE)]
    assert places == sorted(places, key=lambda place: place["x"])
    assert alice.jobs()[0]["deleted_at"] is None


def test_without_a_network_nothing_is_deleted_and_it_says_so(pictures):
    alice = pictures
    alice.cut()

    alice.press("Delete", open_picture(alice, LIGHTHOUSE))

    expect(alice.page.get_by_role("status")).to_contain_text("No connection")
    alice.until_drawn(LIGHTHOUSE)
    alice.heal()
    assert alice.jobs()[0]["deleted_at"] is None


def test_a_picture_is_saved_as_it_is_stored(pictures, tmp_path: Path):
    alice = pictures
    view = open_picture(alice, LIGHTHOUSE)

    with alice.page.expect_download() as saving:
        alice.press("Save", view)

    assert saving.value.suggested_filename.startswith("a-lighthouse-at-dusk-oil-painting-1.")
    saving.value.save_as(tmp_path / "saved")
    assert Image.open(tmp_path / "saved").size == (832, 1216)


def test_a_prompt_is_copied_and_a_link_opens_the_picture_for_anybody(pictures):
    alice = pictures
    alice.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    view = open_picture(alice, LIGHTHOUSE)
    copied = "navigator.clipboard.readText()"

    alice.press("Copy prompt", view)
    expect(alice.page.get_by_role("status")).to_contain_text("Prompt copied")
    assert alice.page.evaluate(copied) == LIGHTHOUSE
    alice.press("Share link", view)
    expect(alice.page.get_by_role("status")).to_contain_text("Link copied")

    answer = httpx.get(alice.page.evaluate(copied))
    assert Image.open(io.BytesIO(answer.content)).size == (832, 1216)


def test_where_there_is_a_sheet_to_share_it_gets_the_link(pictures):
    alice = pictures
    alice.page.evaluate("() => { navigator.share = async ({url}) => { window.shared = url; }; }")

    alice.press("Share link", open_picture(alice, LIGHTHOUSE))

    link = eventually(lambda: alice.page.evaluate("window.shared"))
    assert "token=" in link


def test_a_favorite_is_one_everywhere(pictures):
    alice = pictures
    view = open_picture(alice, LIGHTHOUSE)
    heart = view.get_by_role("button", name="Favorite")
    expect(heart).to_have_attribute("aria-pressed", "false")

    heart.click()

    expect(heart).to_have_attribute("aria-pressed", "true")
    eventually(lambda: alice.jobs()[0]["is_favorite"])
    alice.press("Close", view)
    expect(alice.card(LIGHTHOUSE).get_by_label("Favorite")).to_be_visible()


def test_public_says_what_it_means_and_private_is_private_again(pictures):
    alice = pictures
    view = open_picture(alice, LIGHTHOUSE)
    shared = "select count(*) from public.images where user_id = %s and share_id is not null"
    expect(view.get_by_text("Only you see this picture")).to_be_visible()

    alice.press("Public", view)
    expect(view.get_by_text("Everybody sees this picture")).to_be_visible()
    eventually(lambda: alice.db.value(shared, alice.user_id) == 1)
    alice.press("Public", view)

    expect(view.get_by_text("Only you see this picture")).to_be_visible()
    eventually(lambda: alice.db.value(shared, alice.user_id) == 0)


def test_a_picture_is_what_the_next_one_starts_from(pictures):
    alice = pictures

    alice.press("Use as start", open_picture(alice, LIGHTHOUSE))
    expect(dialog(alice)).to_have_count(0)
    alice.ask("the same by day")

    eventually(lambda: len(alice.jobs()) == 3)
    job = alice.jobs()[0]
    path = "select storage_path from public.images where generation_id = %s"
    assert alice.jobs()[2]["input"]["image"] == f"generations/{alice.db.value(path, job['id'])}"


def test_keys_open_turn_and_close_and_the_focus_comes_back(pictures, stack):
    alice = pictures
    token = "JSON.parse(localStorage.session).access_token"
    headers = {"apikey": stack.anon_key, "Authorization": f"Bearer {alice.page.evaluate(token)}"}
    asked = {"model": "darkroom/preview", "prompt": "two plums", "params": {"num_outputs": 2}}
    url = f"{stack.api_url}/rest/v1/rpc/enqueue_generation"
    assert httpx.post(url, json=asked, headers=headers).is_success
    alice.open()
    alice.until_drawn("two plums")
    card = alice.page.get_by_role("button", name="Open: two plums")
    card.focus()

    alice.page.keyboard.press("Enter")

    expect(alice.page.get_by_role("dialog", name="Picture 1 of 2: two plums")).to_be_visible()
    close = dialog(alice).get_by_role("button", name="Close")
    expect(close).to_be_focused()
    within = "document.querySelector('[role=dialog]').contains(document.activeElement)"
    for _ in range(30):
        alice.page.keyboard.press("Tab")
        assert alice.page.evaluate(f"{within} || document.activeElement.getAttribute('role')")
    assert alice.page.evaluate(within)
    alice.page.keyboard.press("ArrowLeft")  # there is none before
    expect(alice.page.get_by_role("dialog", name="Picture 1 of 2")).to_be_visible()
    for name in ("Picture 2 of 2: two plums", f"Picture: {FOX}", f"Picture: {LIGHTHOUSE}"):
        alice.page.keyboard.press("ArrowRight")
        expect(alice.page.get_by_role("dialog", name=name)).to_be_visible()
    alice.page.keyboard.press("ArrowLeft")
    is_open(alice, FOX)
    alice.page.keyboard.press("Escape")
    expect(dialog(alice)).to_have_count(0)
    expect(card).to_be_focused()


def test_a_finger_turns_the_page(pictures):
    alice = pictures
    alice.page.set_viewport_size(PHONE)
    open_picture(alice, FOX)
    finger = alice.page.context.new_cdp_session(alice.page)

    def touch(kind: str, *x: float) -> None:
        points = [{"x": each, "y": 300} for each in x]
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})

    def draw(start: int, end: int) -> None:
        touch("Start", start)
        for step in range(1, 6):
            touch("Move", start + (end - start) * step / 5)
        touch("End")

    draw(300, 100)
    is_open(alice, LIGHTHOUSE)
    draw(100, 130)  # not far enough
    is_open(alice, LIGHTHOUSE)
    draw(100, 300)
    is_open(alice, FOX)


def test_of_a_long_history_only_what_is_near_is_drawn(alice):
    alice.db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input, status,"
        " price_credits, image_count, finished_at, error_code, error_message)"
        " select %s, 'darkroom/preview', 'number ' || n, '{}', '{}', 'failed', 0, 1, now(),"
        " 'internal', 'Something went wrong on our side.' from generate_series(1, 200) as n",
        alice.user_id,
    )
    alice.open()
    alice.until("number 200", "failed")
    last = alice.card("").filter(has_text=re.compile("number 1$"))

    def scrolled_to_the_end() -> bool:
        alice.page.mouse.move(800, 400)
        alice.page.mouse.wheel(0, 3000)
        alice.wait(0.1)
        assert alice.page.locator('[data-testid^="card-"]').count() < 80
        return last.is_visible()

    eventually(scrolled_to_the_end, within=60)


def test_the_looks_of_what_is_done(pictures):
    alice = pictures
    ask(alice, REFUSED, "Landscape")
    alice.until(REFUSED, "failed")
    alice.look("failed")
    view = open_picture(alice, FOX)
    alice.look("viewer")
    alice.press("Copy prompt", view)
    alice.look("said")
    alice.press("Delete", view)
    alice.look("deleted")


def test_the_looks_of_what_waits(alice, workers):
    ask(alice, LIGHTHOUSE, "Portrait")
    ask(alice, FOX, "Landscape")
    alice.until(FOX, "queued")
    alice.look("waiting")
    workers.start(PREVIEW_SECONDS=20)
    developing = re.compile("Developing [4-7]")
    expect(alice.until(FOX, "processing")).to_contain_text(developing, timeout=20_000)
    alice.look("developing")
