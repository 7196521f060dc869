"""Prompts to start from: a user's own and the app's."""

from __future__ import annotations

import uuid

from actors import refused
from database import unchanged

APPS = "insert into public.prompt_templates (title, prompt) values ('Sky', 'the sky') returning id"


def titles(user) -> list[tuple[str, bool]]:
    """Return title and whether it is the user's own."""
    return [(each["title"], each["is_own"]) for each in user.list_prompt_templates()]


def test_a_template_is_kept_listed_changed_and_deleted_once(alice):
    prompt = "a {animal} in the style of {painter}, {animal}"
    wish = {"prompt": prompt, "model": "darkroom/preview", "params": {"width": 768}}
    saved = alice.save_prompt_template("Animal portrait", **wish)

    assert alice.list_prompt_templates() == [saved]
    assert saved.pop("created_at")
    template_id = saved.pop("id")
    told = {"title": "Animal portrait", "is_own": True, "placeholders": ["animal", "painter"]}
    assert saved == wish | told
    alice.save_prompt_template("Ocean", "the {colour} ocean", id=template_id)
    (template,) = alice.list_prompt_templates()
    assert (template["id"], template["title"]) == (template_id, "Ocean")
    assert (template["placeholders"], template["params"]) == (["colour"], {})
    assert alice.delete_prompt_template(template_id) == {"id": template_id}
    assert alice.list_prompt_templates() == []
    with refused("PT404", "not_found"):
        alice.delete_prompt_template(template_id)


def test_the_apps_templates_are_the_operators_and_come_after_the_users_own(alice, bob, service):
    service.query(APPS)
    alice.save_prompt_template("Sea", "the sea")
    alice.save_prompt_template("Land", "the land")
    assert titles(alice) == [("Land", True), ("Sea", True), ("Sky", False)]

    service.query("update public.prompt_templates set title = 'Clouds' where user_id is null")
    assert titles(bob) == [("Clouds", False)]
    service.query("delete from public.prompt_templates where user_id is null")
    assert titles(bob) == []


def test_templates_of_others_and_of_the_app_cannot_be_changed(db, alice, bob, service):
    (app,) = service.query(APPS)
    bobs = bob.save_prompt_template("Sea", "the sea")["id"]
    refusals = []

    for template_id in (str(app["id"]), bobs, str(uuid.uuid4())):
        with unchanged(db), refused("PT404", "not_found") as expected:
            alice.save_prompt_template("Mine", "mine", id=template_id)
        refusals.append(expected.refusal)
        with unchanged(db), refused("PT404", "not_found") as expected:
            alice.delete_prompt_template(template_id)
        refusals.append(expected.refusal)

    assert len(set(refusals)) == 1


def test_a_bad_template_or_one_too_many_is_refused(db, alice):
    for name, values in {
        "title": ["", None, "x" * 101],
        "prompt": [" ", None, "x" * 4001],
        "model": ["", "x" * 101],
        "params": [[], {"x": "y" * 9000}],
    }.items():
        for value in values:
            with unchanged(db), refused("PT400", "invalid_input") as expected:
                alice.save_prompt_template(**{"title": "Sea", "prompt": "the sea"} | {name: value})
            assert expected.detail.startswith(f"{name}: ")

    db.execute(
        "insert into public.prompt_templates (user_id, title, prompt)"
        " select %s, 'Sea', 'the sea' from generate_series(1, 100)",
        alice.id,
    )
    with unchanged(db), refused("PT400", "invalid_input"):
        alice.save_prompt_template("One more", "the sea")
    own = alice.list_prompt_templates()[0]["id"]
    assert alice.save_prompt_template("Changed", "the sea", id=own)["title"] == "Changed"
