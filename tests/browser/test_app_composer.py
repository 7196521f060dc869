"""Asking for a picture, whatever the catalogue and the screen: what is shown, pinned and sent."""

from __future__ import annotations

import pytest
from actors import PREVIEW
from app_page import DEAREST, PHONE, WIDE, App
from database import Database
from playwright.sync_api import Locator, expect
from worker_process import eventually

pytest_plugins = ["http_fixtures"]

LIGHTHOUSE = "a lighthouse at dusk, oil painting"
IN_VIEW = """([inner, outer]) => {
  const [a, b] = [inner.getBoundingClientRect(), outer.getBoundingClientRect()];
  return a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
}"""


@pytest.fixture(params=[WIDE, PHONE], ids=["wide", "phone"])
def ada(request: pytest.FixtureRequest, catalogue: Database, app: App) -> App:
    """Somebody signed up, on a screen of this size, who can choose from the whole catalogue."""
    app.page.set_viewport_size(request.param)
    app.open()
    app.sign_up()
    return app


def button(app: App, name: str) -> Locator:
    return app.page.get_by_role("button", name=name)


def is_scrolled_to(app: App, element: Locator, box: Locator) -> bool:
    """Turn the wheel over the box until the element is inside of it."""
    box.hover()
    app.page.mouse.wheel(0, 200)
    handles = [element.element_handle(), box.element_handle()]
    return bool(app.page.evaluate(IN_VIEW, handles))


def test_generate_is_on_the_screen_with_the_whole_catalogue_and_many_pictures(ada):
    ada.db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input, status,"
        " price_credits, image_count, finished_at, error_code, error_message)"
        " select %s, %s, 'number ' || n, '{}', '{}', 'failed', 0, 1, now(), 'internal', 'Oh.'"
        " from generate_series(1, 20) as n",
        ada.user_id,
        PREVIEW,
    )
    ada.open()
    ada.until("number 20", "failed")
    assert ada.db.value("select count(*) from public.models where is_active") >= 14
    expect(button(ada, "Generate")).to_be_in_viewport(ratio=1)

    ada.page.mouse.move(ada.place("number 20")["x"] + 9, 300)
    ada.page.mouse.wheel(0, 900)

    expect(ada.card("number 20")).not_to_be_in_viewport()
    expect(button(ada, "Generate")).to_be_in_viewport(ratio=1)


def test_the_panel_scrolls_under_generate_where_it_does_not_fit(ada):
    width = ada.page.evaluate("innerWidth")
    ada.page.set_viewport_size({"width": width, "height": 360})
    panel = ada.page.get_by_test_id("panel")
    expect(button(ada, "Generate")).to_be_in_viewport(ratio=1)
    expect(button(ada, "Sign out")).to_be_in_viewport(ratio=1)

    eventually(lambda: is_scrolled_to(ada, button(ada, "From a picture"), panel))

    expect(button(ada, "Generate")).to_be_in_viewport(ratio=1)


def test_the_sheet_scrolls_to_the_last_model_and_finds_by_name(ada):
    ada.press("Model")
    sheet = ada.page.get_by_role("dialog", name="Choose a model")
    models = ada.page.get_by_test_id("models")

    eventually(lambda: is_scrolled_to(ada, button(ada, DEAREST), models))
    ada.page.get_by_label("Search models").fill("IDEOGRAM")
    expect(models.get_by_role("button")).to_contain_text(["Ideogram 3 Turbo"])
    ada.press("Close", sheet)

    expect(sheet).to_have_count(0)


def test_a_dialog_is_left_by_escape_and_gives_the_focus_back(ada):
    row = button(ada, "Model")
    row.focus()
    ada.page.keyboard.press("Enter")
    dialog = ada.page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    assert dialog.evaluate("each => each.contains(document.activeElement)")

    ada.page.keyboard.press("Escape")

    expect(dialog).to_have_count(0)
    expect(row).to_be_focused()


def test_the_cheapest_is_taken_and_the_choice_is_kept_until_the_user_leaves(ada):
    cheapest = ada.db.value("select min(price_credits) from public.models")
    expect(button(ada, "Generate")).to_contain_text(f"{cheapest} credit")

    ada.choose("Seedream 4")
    ada.open()

    expect(button(ada, "Model")).to_contain_text("Seedream 4")
    expect(button(ada, "Generate")).to_contain_text("6 credits")
    ada.press("Sign out")
    eventually(lambda: "seedream" not in ada.page.evaluate("JSON.stringify(localStorage)"))


def test_what_it_lacks_is_said_before_the_press(ada):
    ada.write(LIGHTHOUSE)
    ada.choose(DEAREST)

    expect(ada.page.get_by_text("Needs 16, you have 10")).to_be_in_viewport(ratio=1)
    expect(button(ada, "Generate")).to_be_disabled()


def test_a_model_that_cannot_be_used_says_why_and_is_not_taken(ada):
    ada.db.execute("update public.models set requires_paid = id like '%/flux-schnell'")
    ada.db.execute("select public.pause_model('stability-ai/sdxl')")
    ada.open()
    expect(button(ada, "Model")).not_to_contain_text("FLUX schnell")

    ada.press("Model")

    dialog = ada.page.get_by_role("dialog")
    for row in ("FLUX schnell For paid users", "SDXL Paused"):
        expect(dialog.get_by_role("button", name=row)).to_be_disabled()


def test_a_prompt_to_begin_with_is_taken_by_a_tap(ada):
    ada.press("A lighthouse at dusk")

    expect(ada.page.get_by_label("Prompt")).to_have_value("A lighthouse at dusk, oil painting")
    expect(ada.page.get_by_label("Prompt")).to_be_focused()
    expect(button(ada, "Generate")).to_be_enabled()


def test_a_picture_to_start_from_leaves_the_models_that_take_one(ada):
    ada.choose("SDXL Lightning")
    ada.write(LIGHTHOUSE)
    button(ada, "Landscape").click()
    expect(button(ada, "Landscape")).to_have_attribute("aria-pressed", "true")
    ada.pick_picture()
    expect(button(ada, "Model")).to_contain_text("Preview")
    ada.press("Model")
    expect(button(ada, "SDXL Lightning")).to_have_count(0)
    ada.press("Close", ada.page.get_by_role("dialog"))
    ada.press("Generate")

    ada.until(LIGHTHOUSE, "queued")

    (job,) = ada.jobs()
    assert (job["model_id"], job["input"]["width"]) == (PREVIEW, 1216)
    assert job["input"]["image"].startswith(ada.user_id)
    ada.press("Remove")
    expect(button(ada, "Model")).to_contain_text("SDXL Lightning")
