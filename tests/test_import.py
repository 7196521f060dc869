"""scripts/model_mapper.py, import_model.py: any image model of Replicate becomes a row."""

import copy

import pytest
from database import unchanged
from models import REF, TEXT, URI, import_model, model_id, recorded_models, replicate_model

from model_mapper import map_model

PROMPT = {"prompt": TEXT}


def rules(schema, schemas=None, name="thing"):
    """Return what becomes of one input's schema."""
    model = replicate_model({name: schema}, schemas=schemas)
    return map_model(model)["input_schema"]["properties"][name]


SCHEMAS = {
    "an enum behind allOf and $ref": (
        {"allOf": [{"$ref": REF + "Size"}], "default": "big", "title": "Size", "x-order": 3},
        {"type": "string", "enum": ["small", "big"], "default": "big"},
    ),
    "an enum behind $ref alone": (
        {"$ref": REF + "Size"},
        {"type": "string", "enum": ["small", "big"]},
    ),
    "references to references": (
        {"allOf": [{"$ref": REF + "Alias"}]},
        {"type": "string", "enum": ["small", "big"]},
    ),
    "anyOf of a type and null": (
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}], "default": None},
        {"type": "integer", "minimum": 1, "nullable": True},
    ),
    "oneOf of a reference and null": (
        {"oneOf": [{"$ref": REF + "Size"}, {"type": "null"}]},
        {"type": "string", "enum": ["small", "big"], "nullable": True},
    ),
    "anyOf of two types": (
        {"anyOf": [{"type": "integer"}, {"type": "string", "enum": ["auto"]}], "default": "auto"},
        {"anyOf": [{"type": "integer"}, {"type": "string", "enum": ["auto"]}], "default": "auto"},
    ),
    "anyOf of constants": (
        {"anyOf": [{"const": "a", "type": "string"}, {"const": "b", "type": "string"}]},
        {"type": "string", "enum": ["a", "b"]},
    ),
    "nullable": (
        {"type": "number", "nullable": True},
        {"type": "number", "nullable": True},
    ),
    "a type array with null": (
        {"type": ["string", "null"], "maxLength": 9},
        {"type": "string", "nullable": True, "maxLength": 9},
    ),
    "a type array of two types": (
        {"type": ["integer", "number"]},
        {"anyOf": [{"type": "integer"}, {"type": "number"}]},
    ),
    "an enum of integers without a type": (
        {"enum": [1, 2, 4], "default": 2},
        {"type": "integer", "enum": [1, 2, 4], "default": 2},
    ),
    "an enum of fractions": ({"enum": [0.25, 1]}, {"type": "number", "enum": [0.25, 1]}),
    "an enum with null": (
        {"enum": ["a", None]},
        {"type": "string", "enum": ["a"], "nullable": True},
    ),
    "a default outside the enum": (
        {"type": "string", "enum": ["a", "b"], "default": "c"},
        {"type": "string", "enum": ["a", "b"]},
    ),
    "a default of another type": ({"type": "integer", "default": "7"}, {"type": "integer"}),
    "an integer default with a fraction of nothing": (
        {"type": "integer", "default": 4.0},
        {"type": "integer", "default": 4},
    ),
    "limits that are out themselves": (
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    ),
    "limits that are out, as OpenAPI 3.0 says it": (
        {"type": "integer", "minimum": 0, "exclusiveMinimum": True},
        {"type": "integer", "minimum": 0, "exclusiveMinimum": 0},
    ),
    "multipleOf": (
        {"type": "integer", "multipleOf": 8},
        {"type": "integer", "multipleOf": 8},
    ),
    "keywords with values of the wrong type": (
        {"type": "string", "enum": "a", "minimum": "0", "format": None, "allOf": {}, "anyOf": 7},
        {"type": "string"},
    ),
    "a list": (
        {"type": "array", "items": {"$ref": REF + "Size"}, "maxItems": 3},
        {"type": "array", "items": {"type": "string", "enum": ["small", "big"]}, "maxItems": 3},
    ),
    "a secret": ({"type": "string", "writeOnly": True}, {"type": "string", "format": "password"}),
    "a secret of cog": (
        {"type": "string", "x-cog-secret": True},
        {"type": "string", "format": "password"},
    ),
    "no type": ({"title": "Thing"}, {}),
    "nothing": ({}, {}),
    "no schema at all": (True, {}),
}
PARTS = {
    "Size": {"type": "string", "enum": ["small", "big"], "description": "An enumeration."},
    "Alias": {"allOf": [{"$ref": REF + "Size"}]},
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_of_a_schema_the_rules_are_kept(case):
    schema, expected = SCHEMAS[case]

    assert rules(schema, PARTS) == expected


@pytest.mark.parametrize(
    ("name", "schema", "limits"),
    [
        ("width", {"type": "integer"}, (64, 2048)),
        ("height", {"type": "integer", "default": 4096}, (64, 4096)),
        ("output_width", {"type": "integer", "minimum": 512}, (512, 2048)),
        ("width", {"type": "integer", "minimum": 4000}, (4000, 4000)),
        ("height", {"type": "number", "maximum": 32}, (32, 32)),
        ("resolution", {"type": "integer", "default": 512}, (None, 2048)),
        ("scale", {"type": "number", "default": 4}, (0, 10)),
        ("refine_steps", {"type": "integer"}, (0, 500)),
        ("guidance_scale", {"type": "number"}, (None, None)),
        ("strength", {"type": "number"}, (None, None)),
    ],
)
def test_sizes_and_lengths_of_work_have_limits_also_where_the_provider_sets_none(
    name, schema, limits
):
    found = rules(schema, name=name)

    assert (found.get("minimum"), found.get("maximum")) == limits


SWITCHES = (
    "disable_safety_checker safety_checker enable_safety_check safety_tolerance nsfw_filter"
    " allow_nsfw safe_mode content_moderation apply_watermark uncensored content_filter"
    " disableSafetyChecker"
)
ADDRESSES = (
    "lora lora_url hf_lora lora_weights extra_lora loraUrl replicate_weights weights checkpoint"
    " model_path hf_token api_key civitai_api_token openaiKey webhook"
)
END_USERS = (
    "user user_id userId end_user_id endUser customer_id customer safety_identifier username email "
    "client_ref account session_id device_id user_hash openai_user user_email tenantId ip_address"
)
OPERATORS = {
    **dict.fromkeys(END_USERS.split(), TEXT),
    "account_id": {"type": "integer"},
    "caller": TEXT | {"description": "A stable identifier of your end-user"},
    **{name: {"type": "boolean"} for name in SWITCHES.split()},
    **dict.fromkeys(ADDRESSES.split(), TEXT),
    "safety_filter_level": {"type": "string", "enum": ["a", "b"]},
    "lora_list": {"type": "array", "items": TEXT},
    "secret_thing": {"type": "string", "format": "password"},
    "archive": URI | {"description": "A zip of pictures"},
    "pose_video": URI | {"description": "A video of a person"},
    "place": TEXT | {"description": "URL of a file to load"},
    "style_model": TEXT | {"description": "A HuggingFace path"},
    "size": TEXT,
    "options": {"type": "object"},
    "shapes": {"type": "array", "items": {"type": "array"}},
    "whatever": {},
}


def test_what_may_harm_or_takes_an_address_is_the_operators():
    model = replicate_model(PROMPT | OPERATORS)

    found = map_model(model)

    assert (found["client_inputs"], found["image_inputs"]) == ([], [])
    assert set(found["input_schema"]["properties"]) == set(model_inputs(model))


def model_inputs(model):
    """Return the inputs as the provider describes them."""
    return model["latest_version"]["openapi_schema"]["components"]["schemas"]["Input"]["properties"]


CLIENTS = {
    "lora_scale": {"type": "number"},
    "negative_prompt": TEXT | {"description": "See https://example.com/url for a guide"},
    "style": {"type": "string", "enum": ["a"], "description": "A style; see the URL"},
    "Guidance Scale (CFG)": {"type": "number"},
    "größe": {"type": "string", "enum": ["S"]},
    "coloration": {"type": "string", "enum": ["warm"]},
    "max_tokens": {"type": "integer"},
    "colors": {"type": "array", "items": TEXT},
    "ip_adapter_scale": {"type": "number"},
    "user_style": {"type": "string", "enum": ["a"]},
}


def test_what_is_harmless_is_the_clients_whatever_its_name():
    found = map_model(replicate_model(PROMPT | CLIENTS))

    assert set(found["client_inputs"]) == set(CLIENTS)


IMAGES = {
    "image": URI,
    "mask": URI | {"default": "https://example.com/mask.png"},
    "input_image_2": URI,
    "image_url": TEXT | {"description": "URL of the picture"},
    "images": {"type": "array", "items": URI},
    "reference_images": {"anyOf": [{"type": "array", "items": URI}, {"type": "null"}]},
    "subject": URI,
    "garment": URI | {"description": "Photo of the garment"},
    "control": {"allOf": [{"$ref": REF + "File"}]},
}


def test_inputs_that_take_images_are_recognised_and_have_no_address_for_a_default():
    found = map_model(replicate_model(PROMPT | IMAGES, schemas={"File": URI}))

    assert set(found["image_inputs"]) == set(found["client_inputs"]) == set(IMAGES)
    assert not [each for each in found["input_schema"]["properties"].values() if "default" in each]


@pytest.mark.parametrize(
    ("inputs", "required", "prompt"),
    [
        (PROMPT | {"negative_prompt": TEXT, "text": TEXT}, [], "prompt"),
        ({"Prompt": TEXT, "seed": {"type": "integer"}}, [], "Prompt"),
        ({"text_prompt": TEXT}, [], "text_prompt"),
        ({"positivePrompt": TEXT, "negativePrompt": TEXT}, [], "positivePrompt"),
        ({"image": URI, "instruction": TEXT}, ["instruction"], "instruction"),
        ({"text": TEXT | {"default": "hello"}}, [], "text"),
        ({"scene_prompt": TEXT, "style_prompt": TEXT}, [], "scene_prompt"),
        ({"image": URI, "scale": {"type": "number"}}, ["image"], None),
        ({"image": URI, "text": TEXT}, ["image"], None),
        ({"image_prompt": URI, "negative_prompt": TEXT}, [], None),
        ({"prompt": {"type": "string", "enum": ["a cat"]}}, [], None),
    ],
)
def test_the_prompt_is_found_under_other_names_and_may_be_missing(inputs, required, prompt):
    found = map_model(replicate_model(inputs, required=required))

    assert found["prompt_input"] == prompt
    assert prompt not in found["client_inputs"]


@pytest.mark.parametrize(
    ("inputs", "count", "most", "default"),
    [
        ({"num_outputs": {"type": "integer", "minimum": 1, "maximum": 4}}, "num_outputs", 4, 1),
        ({"num_images": {"type": "integer", "default": 8}}, "num_images", 8, 8),
        ({"n": {"type": "integer", "minimum": 0, "maximum": 100}}, "n", 16, 1),
        ({"Num Outputs": {"type": "integer", "enum": [1, 4]}}, "Num Outputs", 4, 1),
        ({"number_of_images": {"type": ["integer", "null"]}}, "number_of_images", 4, 1),
        ({"batch_size": {"type": "integer"}, "n": {"type": "integer"}}, "n", 4, 1),
        (
            {"number_of_outputs": {"type": "integer"}, "images_per_prompt": {"type": "integer"}}
            | {"number_of_images_per_pose": {"type": "integer"}},
            "number_of_outputs", 4, 1,
        ),
        ({"batch_count": {"type": "integer", "maximum": 9}}, "batch_count", 9, 1),
    ],
)  # fmt: skip
def test_only_what_is_charged_says_how_many_images(inputs, count, most, default):
    found = map_model(replicate_model(PROMPT | inputs))

    assert (found["image_count_input"], found["max_images"]) == (count, most)
    assert found["client_inputs"] == [count]
    assert found["input_schema"]["properties"][count]["default"] == default
    assert "nullable" not in found["input_schema"]["properties"][count]


@pytest.mark.parametrize("kind", [{"type": "number"}, {"type": "string", "enum": ["1", "4"]}])
def test_a_count_we_cannot_charge_by_is_not_the_clients(kind):
    found = map_model(replicate_model(PROMPT | {"num_outputs": kind}))

    assert (found["image_count_input"], found["client_inputs"]) == (None, [])


OUTPUTS = {
    "a uri": URI,
    "uris": {"type": "array", "items": URI},
    "uris, one by one": {"type": "array", "items": URI, "x-cog-array-type": "iterator"},
    "a reference": {"$ref": REF + "Picture"},
    "an object of uris": {"type": "object", "properties": {"image": URI, "mask": URI}},
    "objects": {"type": "array", "items": {"$ref": REF + "Pictures"}},
    "a nullable uri": {"anyOf": [URI, {"type": "null"}]},
    "no type": {"title": "Output"},
    "nothing": {},
    "no schema": None,
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_that_may_hold_images_is_accepted(case):
    parts = {"Picture": URI, "Pictures": {"type": "object", "properties": {"picture": URI}}}

    assert map_model(replicate_model(PROMPT, OUTPUTS[case], schemas=parts))


BAD = {
    "a text": (replicate_model(PROMPT, TEXT), "its output is text"),
    "words one by one": (
        replicate_model(
            PROMPT, {"type": "array", "items": TEXT, "x-cog-array-type": "iterator"}
        ),
        "its output is text",
    ),
    "a number": (replicate_model(PROMPT, {"type": "number"}), "its output is a number"),
    "numbers": (
        replicate_model(PROMPT, {"type": "array", "items": {"type": "number"}}),
        "its output is a number",
    ),
    "an object of texts": (
        replicate_model(PROMPT, {"type": "object", "properties": {"answer": TEXT}}),
        "its output is text",
    ),
    "weights": (
        replicate_model(PROMPT, {"type": "object", "properties": {"weights": URI}}),
        "its output holds no image",
    ),
    "a video by its title": (
        replicate_model(PROMPT, URI | {"title": "Video"}),
        "its output is video",
    ),
    "audio by its description": (
        replicate_model(PROMPT, URI | {"description": "The audio file"}),
        "its output is audio",
    ),
    "a video by the model's name": (
        replicate_model(PROMPT, name="stable-video-diffusion"),
        "its output is video",
    ),
    "a video by the model's description": (
        replicate_model(PROMPT, description="A great text-to-video model"),
        "its output is video",
    ),
    "audio by the model's description": (
        replicate_model(PROMPT, description="Masked Audio Generation"),
        "its output is audio",
    ),
    "a video by its frames": (
        replicate_model(PROMPT | {"num_frames": {"type": "integer"}}),
        "its output is video",
    ),
    "music by its formats": (
        replicate_model(PROMPT | {"format": {"enum": ["mp3", "wav"]}}),
        "its output is mp3",
    ),
    "a reference to nowhere": (
        replicate_model({"size": {"$ref": REF + "Size"}}),
        "#/components/schemas/Size leads nowhere",
    ),
    "a reference to elsewhere": (
        replicate_model({"size": {"$ref": "https://example.com/size.json"}}),
        "https://example.com/size.json leads nowhere",
    ),
    "a circle": (
        replicate_model({"a": {"$ref": REF + "A"}}, schemas={"A": {"$ref": REF + "A"}}),
        "leads round in circles",
    ),
    "a wider circle": (
        replicate_model(
            {"a": {"$ref": REF + "A"}},
            schemas={
                "A": {"type": "array", "items": {"$ref": REF + "B"}},
                "B": {"anyOf": [{"$ref": REF + "A"}, {"type": "null"}]},
            },
        ),
        "leads round in circles",
    ),
    "a circle in the output": (
        replicate_model(
            PROMPT,
            {"$ref": REF + "Tree"},
            schemas={"Tree": {"type": "object", "properties": {"child": {"$ref": REF + "Tree"}}}},
        ),
        "leads round in circles",
    ),
    "a required secret": (
        replicate_model(PROMPT | {"api_key": TEXT}, required=["prompt", "api_key"]),
        "input api_key is required, but not for clients",
    ),
    "a required video": (
        replicate_model(PROMPT | {"video": URI}, required=["video"]),
        "input video is required, but not for clients",
    ),
    "no version": (replicate_model(PROMPT, latest_version=None), "latest_version"),
    "a version without a schema": (
        replicate_model(PROMPT, latest_version={"id": "1"}),
        "latest_version",
    ),
    "no owner": (replicate_model(PROMPT, owner=None), "owner and name"),
    "an odd name": (replicate_model(PROMPT, name="a model"), "owner and name"),
    "a list": ([], "owner and name"),
    "a text for a model": ("a/b", "owner and name"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_mapped_is_refused_with_the_reason(db, case):
    model, reason = BAD[case]

    with unchanged(db), pytest.raises(ValueError) as refusal:
        import_model(db, model)

    assert str(refusal.value).startswith("model: ")
    assert reason in str(refusal.value)


def test_a_model_without_inputs_is_accepted():
    model = replicate_model({})
    del model["latest_version"]["openapi_schema"]["components"]["schemas"]["Input"]["properties"]

    assert map_model(model)["input_schema"] == {"required": [], "properties": {}}


def test_a_schema_of_thousands_of_options_is_accepted():
    options = [f"option {number}" for number in range(5000)]

    assert rules({"enum": options})["enum"] == options


@pytest.mark.parametrize(
    ("said", "versioned"),
    [
        ({"is_official": True}, False),
        ({"is_official": False, "default_example": {"metrics": {"image_count": 1}}}, True),
        ({"default_example": {"metrics": {"image_count": 1}}}, False),
        ({"default_example": {"metrics": {"predict_time": 1}}}, True),
        ({}, True),
        ({"default_example": None}, True),
    ],
)
def test_official_models_are_called_by_name_others_by_version(said, versioned):
    found = map_model(replicate_model(PROMPT, owner="Some-Body", name="A_Model.2", **said))

    assert found["id"] == "some-body/a_model.2"
    assert found["provider_ref"] == "Some-Body/A_Model.2" + (":" + "0" * 64 if versioned else "")


# What import_model makes of it.

MODEL = replicate_model(
    PROMPT
    | {
        "seed": {"type": "integer"},
        "image": URI,
        "num_outputs": {"type": "integer", "minimum": 1, "maximum": 4},
        "disable_safety_checker": {"type": "boolean", "default": False},
    },
    required=["prompt"],
)


def test_a_new_model_is_not_for_sale_until_it_has_a_price(db):
    unpriced = import_model(db, MODEL)
    priced = import_model(db, MODEL | {"name": "another"}, price_credits=3)

    assert unpriced["is_active"] == (None, False)
    assert (priced["is_active"], priced["paid_price_credits"]) == ((None, True), (None, 3))
    assert priced["title"] == (None, "Another")


def test_a_dry_run_shows_and_changes_nothing(db):
    with unchanged(db):
        shown = import_model(db, MODEL, dry_run=True, price_credits=3)

    assert import_model(db, MODEL, price_credits=3) == shown


def test_importing_again_changes_nothing(db):
    import_model(db, MODEL, price_credits=3, allow_inputs=["disable_safety_checker"])

    with unchanged(db):
        assert import_model(db, MODEL) == {}


def test_importing_again_keeps_what_the_operator_decided(db):
    import_model(db, MODEL)
    decided = {
        "title": "Mine",
        "price_credits": 7,
        "paid_price_credits": 2,
        "is_active": True,
        "requires_paid": True,
        "deadline": "00:09:00",
        "operator_input": {"disable_safety_checker": False},
        "max_images": 2,
        "cost_usd": 0.01,
        "cost_unit": "image",
    }
    changed = import_model(db, MODEL, **decided)
    assert {field: after for field, (_, after) in changed.items()} == decided
    newer = copy.deepcopy(MODEL)
    model_inputs(newer)["steps"] = {"type": "integer"}

    changed = import_model(db, newer)

    assert set(changed) == {"client_inputs", "input_schema"}


def test_importing_again_keeps_which_inputs_are_the_clients(db):
    import_model(db, MODEL, allow_inputs=["disable_safety_checker"])
    db.execute(
        "update public.models set client_inputs = array_remove(client_inputs, 'image'),"
        " image_inputs = '{}' where id = 'somebody/a-model'"
    )
    newer = copy.deepcopy(MODEL)
    model_inputs(newer)["mask"] = URI

    changed = import_model(db, newer)

    assert changed["client_inputs"][1] == ["disable_safety_checker", "mask", "num_outputs", "seed"]
    assert changed["image_inputs"] == ([], ["mask"])


def test_an_input_the_operator_sets_is_not_the_clients(db):
    changed = import_model(db, MODEL, operator_input={"seed": 7})

    assert "seed" not in changed["client_inputs"][1]


def test_a_required_input_may_come_from_the_operator(db):
    model = replicate_model(PROMPT | {"api_key": TEXT}, required=["api_key"])

    assert import_model(db, model, operator_input={"api_key": "k"})


@pytest.mark.parametrize(
    ("options", "detail"),
    [
        ({"allow_inputs": ["nonsense"]}, "model: it has no input nonsense"),
        ({"price": 3}, "options.price: not an option"),
        ({"id": "some/other"}, "options.id: not an option"),
    ],
)
def test_options_that_mean_nothing_are_refused(db, options, detail):
    with unchanged(db), pytest.raises(ValueError) as refusal:
        import_model(db, MODEL, **options)

    assert str(refusal.value).startswith(detail)


@pytest.mark.parametrize("model", recorded_models(), ids=model_id)
def test_the_seed_holds_what_the_recorded_models_say(db, model):
    with unchanged(db):
        assert import_model(db, model) == {}


@pytest.mark.parametrize("model", recorded_models(), ids=model_id)
def test_recorded_models_can_be_entered_anew(db, model):
    before = db.row("select * from public.models where id = %s", model_id(model))
    db.execute("delete from public.models where id = %s", model_id(model))

    import_model(db, model)

    after = db.row("select * from public.models where id = %s", model_id(model))
    same = {"input_schema", "prompt_input", "image_inputs", "image_count_input", "provider_ref"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
