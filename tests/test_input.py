"""What fits a model's schema, and what the provider is sent."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from actors import PREVIEW, User, Worker, refused
from database import Database
from psycopg.types.json import Jsonb

FLUX = "black-forest-labs/flux-"
OTHER = str(uuid.uuid4())


class Asker:
    """A user who may ask of every model, with a source image."""

    def __init__(self, db: Database) -> None:
        db.lift_limits()
        db.execute("update public.models set is_active = true, requires_paid = false")
        self.db, self.user = db, User(db).has(1_000_000)
        self.picture = f"{self.user.id}/photos/me.png"
        query = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
        db.execute(query, self.picture)

    def sent(self, model: str, params: dict[str, Any], prompt: str = "a lighthouse") -> Any:
        """Ask; return what the provider will be sent."""
        job_id = self.user.enqueued(prompt, model, params=params)
        query = "select provider_input from public.generations where id = %s"
        return self.db.value(query, job_id)

    def refusal(self, model: str, params: dict[str, Any], prompt: str = "a lighthouse") -> str:
        """Ask for what is refused; return what is wrong."""
        with refused("PT400", "invalid_input") as refusal:
            self.sent(model, params, prompt)
        return refusal.detail

    def schema_has(self, **rules: Any) -> None:
        """Have these rules in every model's schema; `a__b` is what is below."""
        for path, value in rules.items():
            query = "update public.models set input_schema = jsonb_set(input_schema, %s, %s)"
            self.db.execute(query, path.split("__"), Jsonb(value))


@pytest.fixture(scope="module")
def shared(server, template):
    """One for all tests that leave the models as they are."""
    database = server.create(template)
    yield Asker(database)
    server.drop(database)


@pytest.fixture
def asker(db):
    """One for a test that changes the models."""
    return Asker(db)


# The rules of a schema.


TEXTS = {"type": "array", "minItems": 1, "items": {"type": "string"}}
AUTO = {"anyOf": [{"type": "integer"}, {"enum": ["auto"], "type": "string"}]}


@pytest.mark.parametrize(
    ("rules", "value", "problem"),
    [
        ({"type": "integer", "nullable": True}, None, None),
        ({"type": "integer"}, 7.0, None),
        ({"type": "integer"}, "7", "not of type integer"),
        ({"type": "integer"}, 7.5, "not of type integer"),
        ({"type": "boolean"}, 1, "not of type boolean"),
        ({"type": "integer", "enum": [1, 4]}, 4.0, None),
        ({"type": "integer", "enum": [1, 4]}, 2, "not one of [1, 4]"),
        ({"type": "string", "enum": ["a"]}, "a ", 'not one of ["a"]'),
        ({"type": "integer", "multipleOf": 8}, 12, "not a multiple of 8"),
        ({"type": "number", "multipleOf": 0.1}, 0.3, None),
        ({"type": "number", "multipleOf": 0.1}, 0.35, "not a multiple of 0.1"),
        ({"type": "number", "exclusiveMinimum": 0}, 0, "not above 0"),
        ({"type": "number", "exclusiveMaximum": 1}, 1, "not below 1"),
        ({"type": "number", "minimum": 1, "maximum": 2}, 10**300, "not between 1 and 2"),
        ({"type": "string", "maxLength": 2}, "🖼🖼", None),
        ({"type": "string", "maxLength": 2}, "abc", "longer than 2 characters"),
        ({"type": "string", "minLength": 1}, "", "shorter than 1 characters"),
        (AUTO, 7, None),
        ({"anyOf": [{"type": "null"}]}, 7, 'none of its types: [{"type": "null"}]'),
        ({"type": "object"}, "{}", "not of type object"),
        ({}, 7, "not of type allowed here"),
        (TEXTS, ["a", "b"], None),
        (TEXTS, [], "shorter than 1 items"),
        (TEXTS, ["a"] * 17, "longer than 16 items"),
        (TEXTS, ["a", 7], "an item is not of type string"),
    ],
)
def test_each_rule_says_what_is_wrong(shared, rules, value, problem):
    query = "select private.input_problem(%s, %s)"

    assert shared.db.value(query, Jsonb(value), Jsonb(rules)) == problem


# The catalogue.


def test_the_seed_of_the_catalogue_is_consistent(shared):
    rows = shared.db.execute("select * from public.models")

    assert len(rows) == 15
    for row in rows:
        assert row["paid_price_credits"] <= row["price_credits"]
        rules = row["input_schema"]["properties"]
        defaults = {name: rule["default"] for name, rule in rules.items() if "default" in rule}
        for name, default in defaults.items():
            query = "select private.input_problem(%s, %s)"
            assert not shared.db.value(query, Jsonb(default), Jsonb(rules[name])), name
        wanted = defaults | row["operator_input"] | {"prompt": "a lighthouse"}
        assert shared.sent(row["id"], {}).items() >= wanted.items()
        unknown = {"prompt", "nonsense", "webhook", *row["operator_input"]}
        for name in unknown - set(row["client_inputs"]):
            told = shared.refusal(row["id"], {name: 1})
            assert told == f"params.{name}: not an input of {row['id']}"
        for blank in (None, "", " \n"):
            assert shared.refusal(row["id"], {}, blank) == "prompt: missing or blank"


# Sizes.


@pytest.mark.parametrize(
    ("model", "asked", "sent"),
    [
        (FLUX + "dev", {"width": 1920, "height": 1080}, {"aspect_ratio": "16:9"}),
        (FLUX + "dev", {"width": 1, "height": 9999}, {"aspect_ratio": "9:21"}),
        (FLUX + "dev", {"aspect_ratio": "17:9"}, {"aspect_ratio": "16:9"}),
        ("recraft-ai/recraft-v3", {"width": 1920, "height": 1080}, {"size": "1820x1024"}),
        ("recraft-ai/recraft-v3", {"aspect_ratio": "3:2"}, {"size": "1536x1024"}),
        ("stability-ai/sdxl", {"aspect_ratio": "16:9"}, {"width": 1344, "height": 768}),
        ("stability-ai/sdxl", {"aspect_ratio": "1:9999"}, {"width": 64, "height": 2048}),
        (FLUX + "1.1-pro", {"width": 512, "height": 768},
         {"aspect_ratio": "custom", "width": 512, "height": 768}),
        (FLUX + "1.1-pro", {"width": 2048, "height": 1024},
         {"aspect_ratio": "custom", "width": 1440, "height": 720}),
        (FLUX + "1.1-pro", {"aspect_ratio": "3:2", "width": 512, "height": 512},
         {"aspect_ratio": "3:2", "width": 512, "height": 512}),
        ("bytedance/seedream-4", {"width": 2048, "height": 1024},
         {"size": "custom", "width": 2048, "height": 1024}),
    ],
)  # fmt: skip
def test_a_size_is_put_in_the_models_own_words(shared, model, asked, sent):
    found = shared.sent(model, asked)

    (kept, *_) = shared.user.list_generations(page_size=1)["generations"]
    assert kept["params"] == asked
    assert found.items() >= sent.items()
    assert found.keys().isdisjoint(asked.keys() - sent.keys())


SIZES = ["square_hd", "square", "portrait_4_3", "portrait_9_16", "landscape_4_3", "landscape_16_9"]
RATIOS = ["match_input_image", "1:1", "16:9", "9:16", "3:4", "4:3"]
SIDES = [256, 288, 432, 512, 768, 1024]
FULL_HD = {"width": 1920, "height": 1080}


def side(**rules: Any) -> dict[str, Any]:
    """Return width and height, each with these rules."""
    return dict.fromkeys(("width", "height"), {"type": "integer"} | rules)


@pytest.mark.parametrize(
    ("knows", "asked", "sent"),
    [
        ({"image_size": {"enum": SIZES}}, FULL_HD, {"image_size": "landscape_16_9"}),
        ({"image_size": {"enum": SIZES}}, {"aspect_ratio": "3:4"}, {"image_size": "portrait_4_3"}),
        ({"image_size": {"enum": SIZES}}, {"aspect_ratio": "1:1"}, {"image_size": "square_hd"}),
        ({"image_size": {"enum": SIZES}}, {"width": 500, "height": 500}, {"image_size": "square"}),
        ({"size": {"enum": ["square", "portrait", "landscape"]}}, FULL_HD, {"size": "landscape"}),
        ({"image_dimensions": {"enum": ["512 * 512", "768 * 512"]}}, FULL_HD,
         {"image_dimensions": "768 * 512"}),
        ({"aspect_ratio": {"enum": RATIOS}, "megapixels": {"enum": ["1", "0.25"]}},
         {"width": 512, "height": 400}, {"aspect_ratio": "4:3", "megapixels": "0.25"}),
        ({"aspect_ratio": {"enum": RATIOS}, "resolution": {"enum": ["1K", "2K", "4K"]}},
         {"width": 4000, "height": 2200}, {"aspect_ratio": "16:9", "resolution": "4K"}),
        ({"aspect_ratio": {"enum": RATIOS}, "resolution": {"enum": ["0.5 MP", "2 MP"]}},
         {"aspect_ratio": "21:9"}, {"aspect_ratio": "16:9"}),
        ({"image_resolution": {"enum": ["256", "512", "768"]}}, {"width": 500, "height": 600},
         {"image_resolution": "512"}),
        (side(enum=SIDES), FULL_HD, {"width": 1024, "height": 512}),
        (side(enum=[str(each) for each in SIDES], type="string"), {"aspect_ratio": "1:1"},
         {"width": "1024", "height": "1024"}),
        (side(minimum=256, maximum=1440, multipleOf=32), {"width": 700, "height": 500},
         {"width": 704, "height": 512}),
        (side(minimum=512, maximum=1024), {"width": 300, "height": 400},
         {"width": 512, "height": 683}),
        # One of a single size makes that.
        ({"seed": {"type": "integer"}}, FULL_HD, {}),
        ({"seed": {"type": "integer"}}, {"aspect_ratio": "16:9"}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_any_model_takes_any_size_as_the_nearest_it_knows_and_says_which(asker, knows, asked, sent):
    asker.db.execute(
        "update public.models set input_schema = %s, client_inputs = %s, image_count_input = null,"
        " image_inputs = '{}' where id = %s",
        Jsonb({"properties": {"prompt": {"type": "string"}} | {
            name: {"type": "string"} | rules for name, rules in knows.items()
        }}),
        list(knows),
        PREVIEW,
    )  # fmt: skip

    answer = asker.user.enqueue(params=asked, idempotency_key="k")

    query = "select provider_input from public.generations where id = %s"
    found = asker.db.value(query, answer["job_id"])
    assert {name: found[name] for name in found.keys() - {"prompt", "seed"}} == sent
    assert answer["size"] == sent
    assert asker.user.enqueue(params=asked, idempotency_key="k")["size"] == sent
    assert asker.user.enqueue(params=sent)["size"] is None


@pytest.mark.parametrize(
    ("model", "asked", "field"),
    [
        (FLUX + "dev", {"width": 1024}, "width"),
        (FLUX + "dev", {"width": 1024, "height": 0}, "height"),
        (FLUX + "dev", {"width": 10**9, "height": 1024}, "height"),
        ("stability-ai/sdxl", {"width": 100_000}, "width"),
        ("stability-ai/sdxl", {"aspect_ratio": "16/9"}, "aspect_ratio"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(shared, model, asked, field):
    assert shared.refusal(model, asked).startswith(f"params.{field}: ")


# Seeds, counts, prompts, operators.


@pytest.mark.parametrize(
    ("rules", "lowest", "highest"),
    [
        ({}, 0, 2**31 - 1),
        ({"minimum": 5, "maximum": 6}, 5, 6),
        ({"minimum": -1, "maximum": 18446744073709551615, "default": 0}, 0, 2**31 - 1),
    ],
)
def test_a_seed_is_chosen_within_the_schema_though_that_gives_one(asker, rules, lowest, highest):
    asker.schema_has(properties__seed={"type": "integer"} | rules)

    seeds = {asker.sent(FLUX + "dev", {})["seed"] for _ in range(30)}

    assert lowest <= min(seeds) <= max(seeds) <= highest
    assert len(seeds) > 1


def test_what_the_operator_sets_or_the_schema_makes_unasked_is_sent_and_charged(asker):
    asker.schema_has(properties__num_outputs__default=3)
    asker.db.execute("update public.models set operator_input = '{\"seed\": 7}'")
    asker.user.has(credits=100)

    assert (
        asker.sent(FLUX + "schnell", {"seed": 8}).items() >= {"seed": 7, "num_outputs": 3}.items()
    )
    assert asker.user.credits() == 97


def test_the_prompt_is_the_models_to_take_or_not(asker):
    asker.schema_has(properties__prompt__maxLength=20)
    assert asker.refusal(FLUX + "dev", {}, "x" * 21) == "prompt: longer than 20 characters"

    asker.schema_has(required=["image"], properties__prompt__default="sharp")
    image = {"image": asker.picture}
    assert asker.sent(FLUX + "dev", image, "")["prompt"] == "sharp"
    assert asker.sent(FLUX + "dev", image, "soft")["prompt"] == "soft"
    assert asker.refusal(FLUX + "dev", {}) == "params.image: missing"
    asker.db.execute('update public.models set operator_input = \'{"image": "x"}\'')
    assert asker.sent(FLUX + "dev", {})["image"] == "x"

    asker.db.execute(
        "update public.models set operator_input = '{}', input_schema ="
        " input_schema #- '{properties,prompt,default}' #- '{required}'"
    )
    assert "prompt" not in asker.sent(FLUX + "dev", image, "")
    assert asker.refusal(FLUX + "dev", {}, "") == "prompt: missing or blank"
    assert asker.refusal(FLUX + "dev", {"image": None}, "") == "prompt: missing or blank"
    asker.schema_has(properties__prompt__default="sharp")
    asker.db.execute("update public.models set prompt_input = null")
    assert asker.sent(PREVIEW, image, "ignored")["prompt"] == "sharp"


def test_a_param_of_null_is_one_not_given(shared):
    asked = {"image": None, "num_outputs": None, "seed": None, "aspect_ratio": None, "width": None}

    found = shared.sent(FLUX + "dev", asked)

    assert {"num_outputs": 1, "aspect_ratio": "1:1"}.items() <= found.items()
    assert found["seed"] is not None
    assert "image" not in found


def test_a_count_may_be_a_text_of_the_models(asker):
    asker.schema_has(properties__num_outputs={"type": "string", "enum": ["1", "4"], "default": "1"})
    asker.user.has(credits=100)

    asker.sent(FLUX + "schnell", {"num_outputs": "4"})
    asker.sent(FLUX + "schnell", {})

    assert asker.user.credits() == 95


# Source images.


def pictures(asker: Asker, user: User | None = None, preview: bool = False) -> list[str]:
    """Have a picture made; return its path and perhaps its preview's, with their bucket."""
    user, worker = user or asker.user, Worker(asker.db)
    job_id = user.enqueued()
    (job,) = [each for each in worker.claim_jobs(100) if each.id == job_id]
    image = job.image()
    if preview:
        image["preview_path"] = image["storage_path"].replace(".png", ".preview.webp")
    worker.complete_job(job, images=[image])
    return [f"generations/{image[key]}" for key in ("storage_path", "preview_path") if key in image]


def test_a_source_image_is_an_own_file_or_an_own_finished_picture_and_nothing_else(shared):
    own, picture, stranger = shared.user.id, shared.picture, User(shared.db).has(10)
    (made, preview), (others, others_preview) = (
        pictures(shared, user, preview=True) for user in (shared.user, stranger)
    )
    live = shared.user.enqueued()
    for path in (picture, f"inputs/{picture}", made):
        assert shared.sent(FLUX + "dev", {"image": path})["image"] == path
        assert shared.sent("bytedance/seedream-4", {"image_input": [made, path]})

    cases = {
        "not a path in your folder of bucket inputs": [
            f"{OTHER}/photos/me.png",
            *(own, f"{own}/", f"/{picture}", f"{own}x/photos/me.png", f"inputs//{picture}"),
            *(
                f"inputs/inputs/{picture}",
                f"inputs/{made}",
                f"avatars/{picture}",
                f"Inputs/{picture}",
            ),
            f"{own}/../{OTHER}/photos/me.png",
            *(f"{own}/photos/../photos/me.png", f"inputs/{own}/./me.png"),
            *(f"{own}/photos//me.png", f"{own}/%2e%2e/me.png", f"{own}/.%252E/{OTHER}/me.png"),
            *(f"{own}/..%2f{OTHER}%2fme.png", f"{own}/..\\{OTHER}\\me.png"),
            *(f"{own}\\photos\\me.png", f"{own}%2fphotos%2fme.png", f"{own.upper()}/photos/me.png"),
            *(
                "https://example.com/me.png",
                f"https://example.com/{picture}",
                f"{own}/" + "x" * 512,
            ),
            *("data:image/png;base64,AAAA", "file:///etc/passwd", "", "inputs/", "inputs"),
            made.upper(),
        ],
        "no such file in bucket inputs": [
            *(f"{picture}\n", f"{picture}?download=1", f"{picture}#x", f"{own}/.me.png"),
            made.removeprefix("generations/"),
        ],
        "no finished picture of yours": [
            *(others, others_preview, preview, f"generations/{picture}", "generations/"),
            *(f"generations/{own}/{live}/0.png", made.replace("0.png", "1.png"), f"{made}?x"),
            *(made.replace("/0.png", "/../" + made.split("/")[2] + "/0.png"), f"{made}\n"),
            *(made.replace(own, stranger.id), others.replace(stranger.id, own)),
            *(made.replace("generations/", "generations//"), f"generations/{made}"),
        ],
    }
    for problem, paths in cases.items():
        for path in paths:
            told = shared.refusal(FLUX + "dev", {"image": path})
            assert told == f"params.image: {problem}", path
            told = shared.refusal("bytedance/seedream-4", {"image_input": [picture, path]})
            assert told == f"params.image_input: {problem}", path


def test_a_source_image_is_there(asker):
    query = "insert into storage.objects (bucket_id, name) values ('generations', %s)"
    asker.db.execute(query, f"{asker.user.id}/output.png")

    for name in ("photos/no-such.png", "photos", "photos/ME.png", "output.png"):
        told = asker.refusal(FLUX + "dev", {"image": f"{asker.user.id}/{name}"})
        assert told == "params.image: no such file in bucket inputs"


def test_a_deleted_picture_is_no_source_until_it_is_restored(asker):
    (made,) = pictures(asker)
    job_id = made.split("/")[2]

    asker.user.delete_generation(job_id)
    told = asker.refusal(FLUX + "dev", {"image": made})
    asker.user.restore_generation(job_id)

    assert told == "params.image: no finished picture of yours"
    assert asker.sent(FLUX + "dev", {"image": made})["image"] == made


@pytest.mark.parametrize(
    "name",
    [
        *("mein Bild (1).png", ".hidden", "a&b=c@d+e,f;g:h!$*'.png", "50%.png", "why?.png", "#1"),
        *("望舌.png", "\u202e.png", "a\tb.png", "..a", "a..", "x" * 475),
    ],
)
def test_whatever_storage_lets_a_file_be_named_it_can_be_a_source(shared, name):
    path = f"{shared.user.id}/{name}"
    query = "insert into storage.objects (bucket_id, name) values ('inputs', %s)"
    shared.db.execute(query, path)

    assert shared.sent(FLUX + "dev", {"image": path})["image"] == path


def test_without_storages_own_record_of_files_a_path_is_taken_as_it_is(asker):
    asker.db.execute("drop schema storage cascade")
    path = f"{asker.user.id}/no-such.png"

    assert asker.sent(FLUX + "dev", {"image": path})["image"] == path
