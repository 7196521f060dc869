"""sql/32_input.sql: what fits a model's schema, and what the provider is sent."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from actors import PREVIEW, refused
from database import unchanged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import model_id, recorded_models
from psycopg.types.json import Jsonb

PROMPT = "a lighthouse at dusk"
OWNER = str(uuid.uuid5(uuid.NAMESPACE_DNS, "owner"))
PICTURE = f"{OWNER}/photos/me.png"
SAFE_INTEGER = 2**53 - 1

FLUX = "black-forest-labs/flux-"
MODELS = [
    "bytedance/sdxl-lightning-4step", "bytedance/seedream-3", "bytedance/seedream-4",
    FLUX + "schnell", FLUX + "dev", FLUX + "krea-dev", FLUX + "1.1-pro", "stability-ai/sdxl",
    "stability-ai/stable-diffusion-3.5-large", "ideogram-ai/ideogram-v3-turbo",
    "google/imagen-4-fast", "recraft-ai/recraft-v3", "recraft-ai/recraft-v3-svg",
    "qwen/qwen-image",
]  # fmt: skip
DOCUMENTED = {
    FLUX + "krea-dev": {"aspect_ratio": "4:5", "num_outputs": 2, "guidance": 4.5, "seed": 7},
    "bytedance/seedream-3": {"aspect_ratio": "16:9", "size": "big", "guidance_scale": 2.5},
    "bytedance/seedream-4": {
        "image_input": [PICTURE], "size": "2K", "max_images": 3, "enhance_prompt": True,
        "sequential_image_generation": "auto",
    },
    "ideogram-ai/ideogram-v3-turbo": {"style_type": "Design", "magic_prompt_option": "Off"},
    "google/imagen-4-fast": {"aspect_ratio": "3:4", "output_format": "png"},
    "qwen/qwen-image": {"image": PICTURE, "strength": 0.7, "negative_prompt": "blurry"},
}  # fmt: skip

many = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def catalog(server, template):
    """One database for the tests that call what only checks; it holds one source image."""
    database = server.create(template)
    database.execute("insert into storage.objects (bucket_id, name) values ('inputs', %s)", PICTURE)
    yield database
    server.drop(database)


def model(db, model_id: str) -> dict[str, Any]:
    """Return a row of the catalogue, its properties on top."""
    row = db.row("select * from public.models where id = %s", model_id)
    return row | {"properties": row["input_schema"]["properties"]}


def prepare(db, model_id: str, params: dict[str, Any], prompt: str | None = PROMPT) -> Any:
    """Return what the provider would be sent."""
    return db.value(
        "select (private.provider_inputs(m, %s, %s, array[%s]))[1]"
        " from public.models as m where m.id = %s",
        OWNER,
        Jsonb(params),
        prompt or "",
        model_id,
    )


def values(rules: dict[str, Any], is_image: bool) -> st.SearchStrategy[Any]:
    """Return a strategy of values that fit."""
    lowest, highest = rules.get("minimum"), rules.get("maximum")
    match rules["type"]:
        case _ if "enum" in rules:
            return st.sampled_from(rules["enum"])
        case "string":
            return (
                st.just(PICTURE)
                if is_image
                else st.text(st.characters(codec="utf-8"), max_size=50).map(
                    lambda text: text.replace("\0", "")
                )
            )
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(
                -SAFE_INTEGER if lowest is None else lowest,
                SAFE_INTEGER if highest is None else highest,
            )
        case "number":
            return st.floats(
                -SAFE_INTEGER if lowest is None else lowest,
                SAFE_INTEGER if highest is None else highest,
            )
        case "array":
            return st.lists(
                values(rules["items"], is_image), max_size=min(3, rules.get("maxItems", 3))
            )
    raise AssertionError(rules)


def valid_params(row: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy of params that fit the model."""
    return st.fixed_dictionaries(
        {},
        optional={
            name: values(row["properties"][name], name in row["image_inputs"])
            for name in row["client_inputs"]
        },
    )


def mutations(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return inputs with values that do not fit: for each input, all that are wrong about it."""
    wrong: list[tuple[str, Any]] = [
        (name, 1)
        for name in ("nonsense", "prompt", "Seed", "webhook", "lora_weights", "", " ")
        if name not in row["client_inputs"]
    ]
    wrong += [(name, value) for name, value in row["operator_input"].items()]
    of_type = {"string": "no such thing", "integer": 7, "number": 7.5, "boolean": True}
    for name in row["client_inputs"]:
        rules = row["properties"][name]
        kind = rules["type"]
        others = [value for other, value in of_type.items() if other != kind]
        if kind == "number":
            others.remove(of_type["integer"])
        wrong += [(name, value) for value in [*others, None, {}, {"a": 1}]]
        wrong += [(name, ["x"] if kind == "array" else [7])]
        if "enum" in rules:
            wrong += [(name, "no such option"), (name, ""), (name, rules["enum"][0] + " ")]
        if kind in ("integer", "number"):
            wrong += [(name, rules.get("maximum", SAFE_INTEGER) + 1), (name, 10**300)]
            wrong += [(name, rules.get("minimum", -SAFE_INTEGER) - 1), (name, -(10**300))]
        if kind == "array":
            wrong += [(name, [PICTURE] * (rules.get("maxItems", 16) + 1))]
        if name in row["image_inputs"]:
            wrong += [(name, "https://example.com/me.png"), (name, [PICTURE, "no/such.png"])]
    return wrong


@pytest.mark.parametrize("model_id", MODELS)
def test_what_fits_the_schema_passes_and_is_completed(catalog, model_id):
    row = model(catalog, model_id)

    @many
    @given(valid_params(row))
    def check(params: dict[str, Any]) -> None:
        sent = prepare(catalog, model_id, params)

        defaults = {name for name, rules in row["properties"].items() if "default" in rules}
        assert defaults | {row["prompt_input"]} <= sent.keys() <= row["properties"].keys()
        assert sent.items() >= (params | row["operator_input"]).items()
        assert sent["prompt"] == PROMPT
        if "seed" in row["properties"]:
            assert "seed" in params or 0 <= sent["seed"] < 2**31
        untouched = {n: r["default"] for n, r in row["properties"].items() if "default" in r}
        untouched = {n: d for n, d in untouched.items() if n not in params and n != "prompt"}
        changed = {n for n in untouched if sent[n] != untouched[n]}
        assert changed <= {"aspect_ratio", "size"} | row["operator_input"].keys()

    check()


@pytest.mark.parametrize("model_id", MODELS)
def test_each_thing_wrong_with_it_is_refused_by_its_name(catalog, model_id):
    row = model(catalog, model_id)
    wrong = mutations(row)
    assert len(wrong) >= 20

    @many
    @given(valid_params(row), st.randoms(use_true_random=False))
    def check(params: dict[str, Any], random: Any) -> None:
        for name, value in random.sample(wrong, 20):
            with refused("PT400", "invalid_input") as refusal:
                prepare(catalog, model_id, params | {name: value})

            assert refusal.detail.startswith(f"params.{name}: "), (name, value, refusal.detail)

    check()


@pytest.mark.parametrize("model_id", MODELS)
def test_nothing_is_written_where_the_input_does_not_fit(db, alice, model_id):
    db.execute("update public.models set is_active = true")
    alice.has(credits=100)
    wrong = mutations(model(db, model_id))
    step = max(1, len(wrong) // 4)

    with unchanged(db):
        for name, value in wrong[::step]:
            if value not in (10**300, -(10**300)):
                with refused("PT400", "invalid_input") as refusal:
                    alice.enqueue(model=model_id, params={name: value})
                assert refusal.detail.startswith(f"params.{name}: ")


@pytest.mark.parametrize("model_id", MODELS)
@pytest.mark.parametrize("prompt", [None, "", " \n"])
def test_a_prompt_is_needed_though_the_schema_has_a_default(catalog, model_id, prompt):
    with refused("PT400", "invalid_input") as refusal:
        prepare(catalog, model_id, {}, prompt)

    assert refusal.detail == "prompt: missing or blank"


@pytest.mark.parametrize("model_id", DOCUMENTED)
def test_documented_examples_pass(catalog, model_id):
    sent = prepare(catalog, model_id, DOCUMENTED[model_id])

    assert sent.items() >= DOCUMENTED[model_id].items()


@pytest.mark.parametrize("recorded", recorded_models(), ids=model_id)
def test_recorded_examples_pass(catalog, recorded):
    row = model(catalog, model_id(recorded))
    example = dict(recorded["default_example"]["input"])
    prompt = example.pop("prompt")
    operators = {"safety_tolerance", "apply_watermark"}

    sent = prepare(
        catalog,
        row["id"],
        {name: value for name, value in example.items() if name not in operators},
        prompt,
    )

    assert example.keys() - row["client_inputs"] <= operators
    assert sent.items() >= {n: v for n, v in example.items() if n not in operators}.items()
    assert sent["prompt"] == prompt


@pytest.mark.parametrize("example", MODELS)
def test_all_of_the_fourteen_have_an_example(example):
    known = {model_id(each) for each in recorded_models()} | DOCUMENTED.keys()

    assert example in known or not recorded_models()


# Rules that no seed row has.


@pytest.mark.parametrize(
    ("rules", "fits", "problem"),
    [
        ({"type": "integer", "nullable": True}, [None, 7, 7.0], {"7": "not of type integer"}),
        ({"type": "integer"}, [], {None: "not of type integer", 7.5: "not of type integer"}),
        ({"type": "integer", "enum": [1, 4]}, [1, 4, 4.0], {2: "not one of [1, 4]"}),
        ({"type": "integer", "multipleOf": 8}, [0, 64], {12: "not a multiple of 8"}),
        ({"type": "number", "multipleOf": 0.1}, [0.3], {0.35: "not a multiple of 0.1"}),
        ({"type": "number", "exclusiveMinimum": 0}, [0.1], {0: "not above 0"}),
        ({"type": "number", "exclusiveMaximum": 1}, [0.9], {1: "not below 1"}),
        ({"type": "string", "maxLength": 2}, ["", "🖼🖼"], {"abc": "longer than 2 characters"}),
        ({"type": "string", "minLength": 1}, ["a"], {"": "shorter than 1 characters"}),
        ({"anyOf": [{"type": "integer"}, {"enum": ["auto"], "type": "string"}]}, [7, "auto"], {}),
        ({"anyOf": [{"type": "null"}]}, [], {7: 'none of its types: [{"type": "null"}]'}),
        ({"type": "object"}, [{}], {"{}": "not of type object"}),
        ({}, [], {7: "not of type allowed here"}),
    ],
)  # fmt: skip
def test_each_rule_says_what_is_wrong(catalog, rules, fits, problem):
    query = "select private.input_problem(%s, %s)"

    found = {value: catalog.value(query, Jsonb(value), Jsonb(rules)) for value in problem}

    assert found == problem
    assert [catalog.value(query, Jsonb(value), Jsonb(rules)) for value in fits] == [None] * len(
        fits
    )


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        (["a", "b"], None),
        ([], "shorter than 1 items"),
        (["a"] * 17, "longer than 16 items"),
        (["a", 7], "an item is not of type string"),
    ],
)
def test_a_list_is_as_good_as_its_items(catalog, items, problem):
    rules = {"type": "array", "minItems": 1, "items": {"type": "string"}}

    found = catalog.value("select private.input_problem(%s, %s)", Jsonb(items), Jsonb(rules))

    assert found == problem


# Sizes.


@pytest.mark.parametrize(
    ("model_id", "asked", "sent"),
    [
        (FLUX + "dev", {"width": 1920, "height": 1080}, {"aspect_ratio": "16:9"}),
        (FLUX + "dev", {"width": 640, "height": 640}, {"aspect_ratio": "1:1"}),
        (FLUX + "dev", {"width": 1, "height": 9999}, {"aspect_ratio": "9:21"}),
        ("google/imagen-4-fast", {"width": 800, "height": 1000}, {"aspect_ratio": "3:4"}),
        ("recraft-ai/recraft-v3", {"width": 1920, "height": 1080}, {"size": "1820x1024"}),
        ("recraft-ai/recraft-v3", {"width": 512, "height": 512}, {"size": "1024x1024"}),
        ("recraft-ai/recraft-v3", {"aspect_ratio": "3:2"}, {"size": "1536x1024"}),
        ("stability-ai/sdxl", {"aspect_ratio": "16:9"}, {"width": 1344, "height": 768}),
        ("stability-ai/sdxl", {"aspect_ratio": "1:1"}, {"width": 1024, "height": 1024}),
        ("stability-ai/sdxl", {"aspect_ratio": "1:9999"}, {"width": 64, "height": 2048}),
        ("bytedance/sdxl-lightning-4step", {"aspect_ratio": "21:9"},
         {"width": 1280, "height": 640}),
        (FLUX + "1.1-pro", {"width": 512, "height": 768},
         {"aspect_ratio": "custom", "width": 512, "height": 768}),
        (FLUX + "1.1-pro", {"aspect_ratio": "3:2"}, {"aspect_ratio": "3:2"}),
        (FLUX + "1.1-pro", {"aspect_ratio": "3:2", "width": 512, "height": 512},
         {"aspect_ratio": "3:2", "width": 512, "height": 512}),
        ("bytedance/seedream-4", {"width": 2048, "height": 1024},
         {"size": "custom", "width": 2048, "height": 1024}),
        ("bytedance/seedream-3", {"width": 768, "height": 1024},
         {"aspect_ratio": "custom", "width": 768, "height": 1024}),
    ],
)  # fmt: skip
def test_a_size_is_put_in_the_models_own_words(catalog, model_id, asked, sent):
    found = prepare(catalog, model_id, asked)

    words = {"width", "height", "aspect_ratio", "size"} & model(catalog, model_id)[
        "properties"
    ].keys()
    defaults = {name: found[name] for name in words & found.keys() - sent.keys()}
    assert {name: found[name] for name in words & found.keys()} == defaults | sent


@pytest.mark.parametrize(
    ("model_id", "asked", "field"),
    [
        (FLUX + "dev", {"width": 1024}, "width"),
        (FLUX + "dev", {"width": 1024, "height": 0}, "height"),
        (FLUX + "dev", {"width": 1024, "height": "tall"}, "height"),
        (FLUX + "dev", {"width": 1024.5, "height": 1024}, "height"),
        (FLUX + "dev", {"width": 10**9, "height": 1024}, "height"),
        (FLUX + "dev", {"aspect_ratio": "17:9"}, "aspect_ratio"),
        ("recraft-ai/recraft-v3", {"aspect_ratio": "wide"}, "aspect_ratio"),
        ("recraft-ai/recraft-v3", {"aspect_ratio": "0:1"}, "aspect_ratio"),
        ("stability-ai/sdxl", {"width": 100_000}, "width"),
        ("stability-ai/sdxl", {"height": 63}, "height"),
        ("stability-ai/sdxl", {"aspect_ratio": "16/9"}, "aspect_ratio"),
        (FLUX + "1.1-pro", {"width": 2048, "height": 1024}, "width"),
    ],
)
def test_a_size_that_makes_no_sense_is_refused(catalog, model_id, asked, field):
    with refused("PT400", "invalid_input") as refusal:
        prepare(catalog, model_id, asked)

    assert refusal.detail.startswith(f"params.{field}: ")


@many
@given(
    st.integers(1, 16384),
    st.integers(1, 16384),
    st.sampled_from([FLUX + "dev", "recraft-ai/recraft-v3", "qwen/qwen-image"]),
)
def test_the_nearest_shape_is_chosen(catalog, width, height, model_id):
    sent = prepare(catalog, model_id, {"width": width, "height": height})

    name = "size" if "size" in sent else "aspect_ratio"
    ratios = {
        option: float.__truediv__(*map(float, option.replace("x", ":").split(":")))
        for option in model(catalog, model_id)["properties"][name]["enum"]
    }

    def distance(option: str) -> float:
        return max(ratios[option] * height / width, width / height / ratios[option])

    assert distance(sent[name]) <= min(map(distance, ratios)) * 1.0001


def test_sides_with_an_enum_or_steps_of_their_own_are_kept_to(db):
    db.execute(
        "update public.models set input_schema = jsonb_set(jsonb_set(input_schema,"
        ' \'{properties,width}\', \'{"type": "integer", "enum": [512, 768, 1000]}\'),'
        ' \'{properties,height}\', \'{"type": "integer", "multipleOf": 100, "maximum": 850}\')'
        " where id = 'stability-ai/sdxl'"
    )

    sent = prepare(db, "stability-ai/sdxl", {"aspect_ratio": "4:3"})

    assert (sent["width"], sent["height"]) == (1000, 800)


def test_what_was_asked_and_what_is_sent_are_both_kept(db, alice):
    db.execute("update public.models set is_active = true")
    asked = {"width": 1920, "height": 1080}

    job_id = alice.has(credits=9).enqueued(model=FLUX + "dev", params=asked)

    row = db.row("select * from public.generations where id = %s", job_id)
    assert row["input"] == asked
    assert row["provider_input"]["aspect_ratio"] == "16:9"
    assert row["provider_input"].keys().isdisjoint(asked)


# Seeds, counts, operators.


@pytest.mark.parametrize(
    ("rules", "lowest", "highest"),
    [
        ({"type": "integer"}, 0, 2**31 - 1),
        ({"type": "integer", "minimum": 5, "maximum": 6}, 5, 6),
        ({"type": "integer", "minimum": -1, "maximum": 18446744073709551615}, 0, 2**31 - 1),
        ({"type": "integer", "minimum": -9007199254740992, "default": -1}, 0, 2**31 - 1),
    ],
)
def test_a_seed_is_chosen_within_the_schema(db, rules, lowest, highest):
    db.execute(
        "update public.models set input_schema = jsonb_set(input_schema, '{properties,seed}', %s)",
        Jsonb(rules),
    )

    seeds = {prepare(db, FLUX + "dev", {})["seed"] for _ in range(50)}

    assert lowest <= min(seeds) <= max(seeds) <= highest
    assert len(seeds) > 1


def test_the_operators_seed_is_nobodys_to_choose(db):
    db.execute("update public.models set operator_input = '{\"seed\": 7}'")

    assert prepare(db, FLUX + "dev", {"seed": 8})["seed"] == 7
    assert prepare(db, FLUX + "dev", {})["seed"] == 7


def test_images_the_schema_makes_unasked_are_charged(db, alice):
    db.execute(
        "update public.models set is_active = true, input_schema ="
        " jsonb_set(input_schema, '{properties,num_outputs,default}', '3')"
        " where id = 'black-forest-labs/flux-schnell'"
    )

    job_id = alice.enqueued(model=FLUX + "schnell")

    images = db.value("select image_count from public.generations where id = %s", job_id)
    assert (images, alice.credits()) == (3, 7)


def test_a_prompt_longer_than_the_model_takes_is_refused(db):
    db.execute(
        "update public.models set input_schema ="
        " jsonb_set(input_schema, '{properties,prompt,maxLength}', '10')"
    )

    with refused("PT400", "invalid_input") as refusal:
        prepare(db, FLUX + "dev", {}, "x" * 11)

    assert refusal.detail == "prompt: longer than 10 characters"


def test_a_model_that_needs_a_picture_may_have_a_prompt_of_its_own(db):
    db.execute(
        "update public.models set input_schema = jsonb_set(jsonb_set(input_schema,"
        " '{required}', '[\"image\"]'), '{properties,prompt,default}', '\"sharp\"')"
    )
    db.execute("insert into storage.objects (bucket_id, name) values ('inputs', %s)", PICTURE)

    assert prepare(db, FLUX + "dev", {"image": PICTURE}, "")["prompt"] == "sharp"
    assert prepare(db, FLUX + "dev", {"image": PICTURE}, "soft")["prompt"] == "soft"


def test_a_model_without_a_prompt_is_sent_none(db):
    db.execute("update public.models set prompt_input = null")

    assert prepare(db, "recraft-ai/recraft-v3", {}, "") == {"size": "1024x1024", "style": "any"}


@pytest.mark.parametrize(("operator", "missing"), [("{}", True), ('{"image": "x"}', False)])
def test_a_required_input_may_be_the_users_or_the_operators(db, operator, missing):
    db.execute(
        "update public.models set operator_input = %s,"
        " input_schema = jsonb_set(input_schema, '{required}', '[\"image\"]')",
        operator,
    )

    if missing:
        with refused("PT400", "invalid_input") as refusal:
            prepare(db, FLUX + "dev", {})
        assert refusal.detail == "params.image: missing"
    else:
        assert prepare(db, FLUX + "dev", {})["image"] == "x"


# Source images.

OTHER = str(uuid.uuid5(uuid.NAMESPACE_DNS, "other"))


@pytest.mark.parametrize(
    "path",
    [
        f"{OTHER}/photos/me.png",
        f"{OWNER}",
        f"{OWNER}/",
        f"/{PICTURE}",
        f"inputs/{PICTURE}",
        f"{OWNER}/../{OTHER}/photos/me.png",
        f"{OWNER}/photos/../photos/me.png",
        f"{OWNER}/photos//me.png",
        f"{OWNER}/.me.png",
        f"{OWNER}\\photos\\me.png",
        f"{PICTURE}\n",
        f"{PICTURE}?download=1",
        f"{PICTURE}#x",
        f"{OWNER}/%2e%2e/me.png",
        f"{OWNER.upper()}/photos/me.png",
        f"{OWNER}x/photos/me.png",
        "https://example.com/me.png",
        f"https://example.com/{PICTURE}",
        "data:image/png;base64,AAAA",
        "file:///etc/passwd",
        "",
    ],
)
@pytest.mark.parametrize("is_list", [False, True])
def test_a_source_image_is_a_path_in_the_own_folder(catalog, path, is_list):
    model_id, name = ("bytedance/seedream-4", "image_input") if is_list else (FLUX + "dev", "image")
    with refused("PT400", "invalid_input") as refusal:
        prepare(catalog, model_id, {name: [PICTURE, path] if is_list else path})

    assert refusal.detail == f"params.{name}: not a path in your folder of bucket inputs"


@pytest.mark.parametrize("name", ["photos/no-such.png", "photos", "photos/ME.png"])
def test_a_source_image_is_there(catalog, name):
    with refused("PT400", "invalid_input") as refusal:
        prepare(catalog, FLUX + "dev", {"image": f"{OWNER}/{name}"})

    assert refusal.detail == "params.image: no such file in bucket inputs"


def test_a_file_of_another_bucket_is_no_source_image(db):
    db.execute("insert into storage.objects (bucket_id, name) values ('generations', %s)", PICTURE)

    with refused("PT400", "invalid_input"):
        prepare(db, FLUX + "dev", {"image": PICTURE})


def test_a_source_image_may_be_null_where_the_model_says_so(db):
    db.execute(
        "update public.models set input_schema ="
        " jsonb_set(input_schema, '{properties,image,nullable}', 'true')"
        " where input_schema -> 'properties' ? 'image'"
    )

    assert prepare(db, FLUX + "dev", {"image": None})["image"] is None


def test_a_user_asks_with_an_image_of_their_own_but_not_with_anothers(db, alice, bob, worker):
    db.execute("update public.models set is_active = true")
    path = f"{alice.id}/me.png"
    db.execute("insert into storage.objects (bucket_id, name) values ('inputs', %s)", path)

    bob.has(credits=9)

    alice.has(credits=9).enqueue(model=FLUX + "dev", params={"image": path})
    with unchanged(db), refused("PT400", "invalid_input"):
        bob.enqueue(model=FLUX + "dev", params={"image": path})

    job = worker.claimed()
    assert {name: job.provider_input[name] for name in job.image_inputs} == {"image": path}


def test_the_seed_of_the_catalogue_is_consistent(catalog):
    rows = catalog.execute("select * from public.models")

    assert {row["id"] for row in rows} == {*MODELS, "darkroom/preview"}
    for row in rows:
        defaults = row["input_schema"]["properties"]
        for name, rules in defaults.items():
            query = "select private.input_problem(%s, %s)"
            if "default" in rules:
                assert not catalog.value(query, Jsonb(rules["default"]), Jsonb(rules)), name
        assert row["client_inputs"] == sorted(row["client_inputs"])
        assert row["paid_price_credits"] <= row["price_credits"]
        assert json.dumps(row["input_schema"]).count("description") == 0


def test_what_the_schema_gives_is_kept_beside_it(db):
    db.execute(
        "update public.models"
        " set input_schema = jsonb_set(input_schema, '{properties,steps}', %s) where id = %s",
        Jsonb({"type": "integer", "default": 7}),
        PREVIEW,
    )

    query = "select default_input from public.models where id = %s"
    assert db.value(query, PREVIEW) == {"width": 1024, "height": 1024, "num_outputs": 1, "steps": 7}


def test_a_seed_is_chosen_though_the_schema_gives_one(db):
    db.execute(
        "update public.models set"
        " input_schema = jsonb_set(input_schema, '{properties,seed,default}', '0') where id = %s",
        PREVIEW,
    )

    assert len({prepare(db, PREVIEW, {})["seed"] for _ in range(3)}) > 1
