"""scripts/model_mapper.py, import_model.py: any image model of Replicate or fal becomes a row."""

import copy

import pytest
from database import unchanged
from models import (
    REF,
    TEXT,
    URI,
    fal_model,
    import_model,
    model_id,
    recorded_models,
    replicate_model,
)

from model_mapper import map_model

PROMPT = {"prompt": TEXT}
INT, NUMBER, BOOLEAN, NULL = ({"type": t} for t in ("integer", "number", "boolean", "null"))
SIZES = {"type": "string", "enum": ["small", "big"]}
PARTS = {
    "Size": SIZES | {"description": "An enumeration."},
    "Alias": {"allOf": [{"$ref": REF + "Size"}]},
    "File": URI,
    "Picture": URI,
    "Pictures": {"type": "object", "properties": {"picture": URI}},
}


def rules(schema, name="thing"):
    """Return what becomes of one input's schema."""
    model = replicate_model({name: schema}, schemas=PARTS)
    return map_model(model)["input_schema"]["properties"][name]


def any_of(*schemas, **rest):
    return {"anyOf": list(schemas)} | rest


SCHEMAS = [
    ({"allOf": [{"$ref": REF + "Size"}], "default": "big"}, SIZES | {"default": "big"}),
    ({"$ref": REF + "Alias"}, SIZES),
    (any_of(INT | {"minimum": 1}, NULL), INT | {"minimum": 1, "nullable": True}),
    (any_of(INT, NULL, default=None), INT | {"nullable": True}),
    ({"oneOf": [{"$ref": REF + "Size"}, NULL]}, SIZES | {"nullable": True}),
    (any_of(INT, SIZES, default="big"), any_of(INT, SIZES, default="big")),
    (any_of({"const": "small", "type": "string"}, {"const": "big", "type": "string"}), SIZES),
    (NUMBER | {"nullable": True}, NUMBER | {"nullable": True}),
    ({"type": ["string", "null"], "maxLength": 9}, TEXT | {"nullable": True, "maxLength": 9}),
    ({"type": ["integer", "number"]}, any_of(INT, NUMBER)),
    ({"enum": [1, 2, 4], "default": 2}, INT | {"enum": [1, 2, 4], "default": 2}),
    ({"enum": [0.25, 1]}, NUMBER | {"enum": [0.25, 1]}),
    ({"enum": ["a", None]}, TEXT | {"enum": ["a"], "nullable": True}),
    (SIZES | {"default": "c"}, SIZES),
    (INT | {"default": "7"}, INT),
    (INT | {"default": 4.0}, INT | {"default": 4}),
    # A list of choices, where the provider takes anything besides.
    (any_of(SIZES, TEXT, {"type": "object"}), SIZES),
    (NUMBER | {"exclusiveMinimum": 0}, NUMBER | {"exclusiveMinimum": 0}),
    # As OpenAPI 3.0 says it.
    (INT | {"minimum": 0, "exclusiveMinimum": True}, INT | {"minimum": 0, "exclusiveMinimum": 0}),
    (INT | {"multipleOf": 8}, INT | {"multipleOf": 8}),
    # Keywords with values of the wrong type.
    (TEXT | {"enum": "a", "minimum": "0", "format": None, "allOf": {}, "anyOf": 7}, TEXT),
    ({"type": "array", "items": {"$ref": REF + "Size"}}, {"type": "array", "items": SIZES}),
    (TEXT | {"writeOnly": True}, TEXT | {"format": "password"}),
    (TEXT | {"x-cog-secret": True}, TEXT | {"format": "password"}),
    ({"title": "Thing"}, {}),
    (True, {}),
    ({"enum": list("ab") * 2500}, TEXT | {"enum": list("ab") * 2500}),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "kept"), SCHEMAS)
def test_of_a_schema_the_rules_are_kept(schema, kept):
    assert rules(schema) == kept


@pytest.mark.parametrize(
    ("name", "schema", "limits"),
    [
        ("width", INT, (64, 2048)),
        ("height", INT | {"default": 4096}, (64, 4096)),
        ("output_width", INT | {"minimum": 512}, (512, 2048)),
        ("width", INT | {"minimum": 4000}, (4000, 4000)),
        ("height", NUMBER | {"maximum": 32}, (32, 32)),
        ("resolution", INT | {"default": 512}, (None, 2048)),
        ("scale", NUMBER | {"default": 4}, (0, 10)),
        ("refine_steps", INT, (0, 500)),
        ("guidance_scale", NUMBER, (None, None)),
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
    **dict.fromkeys(SWITCHES.split(), BOOLEAN),
    **dict.fromkeys(ADDRESSES.split(), TEXT),
    "account_id": INT,
    "caller": TEXT | {"description": "A stable identifier of your end-user"},
    "safety_filter_level": SIZES,
    "lora_list": {"type": "array", "items": TEXT},
    "secret_thing": TEXT | {"format": "password"},
    "archive": URI | {"description": "A zip of pictures"},
    "pose_video": URI | {"description": "A video of a person"},
    "place": TEXT | {"description": "URL of a file to load"},
    "style_model": TEXT | {"description": "A HuggingFace path"},
    "size": TEXT,
    "options": {"type": "object"},
    "shapes": {"type": "array", "items": {"type": "array"}},
    "whatever": {},
    # A count that cannot be charged by.
    "num_outputs": NUMBER,
}
CLIENTS = {
    "lora_scale": NUMBER,
    "negative_prompt": TEXT | {"description": "See https://example.com/url for a guide"},
    "style": SIZES | {"description": "A style; see the URL"},
    "Guidance Scale (CFG)": NUMBER,
    "größe": SIZES,
    "coloration": SIZES,
    "max_tokens": INT,
    "colors": {"type": "array", "items": TEXT},
    "ip_adapter_scale": NUMBER,
    "user_style": SIZES,
}
IMAGES = {
    "image": URI,
    "mask": URI | {"default": "https://example.com/mask.png"},
    "input_image_2": URI,
    "image_url": TEXT | {"description": "URL of the picture"},
    "images": {"type": "array", "items": URI},
    "reference_images": any_of({"type": "array", "items": URI}, NULL),
    "subject": URI,
    # Nothing says that it takes an image, but that it takes a file.
    "content": URI,
    "control_lora_image_url": TEXT,
    "control": {"allOf": [{"$ref": REF + "File"}]},
}


def model_inputs(model):
    """Return the inputs as the provider describes them."""
    return model["latest_version"]["openapi_schema"]["components"]["schemas"]["Input"]["properties"]


def test_what_may_harm_or_takes_an_address_is_the_operators():
    model = replicate_model(PROMPT | OPERATORS)

    found = map_model(model)

    assert (found["client_inputs"], found["image_inputs"]) == ([], [])
    assert found["image_count_input"] is None
    assert set(found["input_schema"]["properties"]) == set(model_inputs(model))


def test_what_is_harmless_is_the_clients_and_images_have_no_address_for_a_default():
    found = map_model(replicate_model(PROMPT | CLIENTS | IMAGES, schemas=PARTS))

    assert set(found["client_inputs"]) == {*CLIENTS, *IMAGES}
    assert set(found["image_inputs"]) == set(IMAGES)
    assert not [each for each in found["input_schema"]["properties"].values() if "default" in each]


@pytest.mark.parametrize(
    ("inputs", "required", "prompt"),
    [
        (PROMPT | {"negative_prompt": TEXT, "text": TEXT}, [], "prompt"),
        ({"Prompt": TEXT, "seed": INT}, [], "Prompt"),
        ({"positivePrompt": TEXT, "negativePrompt": TEXT}, [], "positivePrompt"),
        ({"image": URI, "instruction": TEXT}, ["instruction"], "instruction"),
        ({"text": TEXT | {"default": "hello"}}, [], "text"),
        ({"scene_prompt": TEXT, "style_prompt": TEXT}, [], "scene_prompt"),
        ({"image": URI, "scale": NUMBER}, ["image"], None),
        ({"image": URI, "text": TEXT}, ["image"], None),
        ({"image_prompt": URI, "negative_prompt": TEXT}, [], None),
        ({"prompt": SIZES}, [], None),
    ],
)
def test_the_prompt_is_found_under_other_names_and_may_be_missing(inputs, required, prompt):
    found = map_model(replicate_model(inputs, required=required))

    assert found["prompt_input"] == prompt
    assert prompt not in found["client_inputs"]


@pytest.mark.parametrize(
    ("inputs", "count", "most", "default"),
    [
        ({"num_outputs": INT | {"minimum": 1, "maximum": 4}}, "num_outputs", 4, 1),
        ({"num_images": INT | {"default": 8}}, "num_images", 8, 8),
        ({"n": INT | {"minimum": 0, "maximum": 100}}, "n", 16, 1),
        ({"Num Outputs": INT | {"enum": [1, 4]}}, "Num Outputs", 4, 1),
        ({"number_of_images": {"type": ["integer", "null"]}}, "number_of_images", 4, 1),
        ({"batch_size": INT, "n": INT}, "n", 4, 1),
        ({"number_of_outputs": INT, "images_per_prompt": INT}, "number_of_outputs", 4, 1),
        ({"batch_count": INT | {"maximum": 9}}, "batch_count", 9, 1),
        ({"num_samples": TEXT | {"enum": ["1", "4"]}, "image_size": INT}, "num_samples", 4, "1"),
        ({"num_images": INT | {"minimum": 1.0, "maximum": 4.0}}, "num_images", 4, 1),
    ],
)
def test_only_what_is_charged_says_how_many_images(inputs, count, most, default):
    found = map_model(replicate_model(PROMPT | inputs))

    assert (found["image_count_input"], found["max_images"]) == (count, most)
    assert set(found["client_inputs"]) == {count} | inputs.keys() & {"image_size"}
    assert str(found["max_images"]) == str(most)
    assert found["input_schema"]["properties"][count]["default"] == default
    assert "nullable" not in found["input_schema"]["properties"][count]


OUTPUTS = [
    URI,
    {"type": "array", "items": URI, "x-cog-array-type": "iterator"},
    {"$ref": REF + "Picture"},
    {"type": "object", "properties": {"image": URI, "mask": URI}},
    {"type": "array", "items": {"$ref": REF + "Pictures"}},
    any_of(URI, NULL),
    {"title": "Output"},
    None,
]


# What the public descriptions of real models say, cut to what matters.
TWO = {"type": "array", "items": URI}
SHOWN = "https://a.example/"
REAL = [
    (  # answers the map that it drew, and the pictures
        {
            "name": "controlnet-scribble",
            "inputs": PROMPT | {"image": URI, "num_samples": TEXT | {"enum": ["1", "4"]}},
            "output": TWO,
            "default_example": {
                "input": {"num_samples": "1"},
                "output": [SHOWN + "output_0.png", SHOWN + "output_1.png"],
            },
        },
        {
            "image_count_input": "num_samples",
            "outputs_path": "$.output[last - $count + 1 to last]",
        },
    ),
    (
        {
            "inputs": PROMPT | {"image_size": INT | {"minimum": 512, "default": 960}},
            "output": TWO,
            "default_example": {"input": {"image_size": 960}, "output": [SHOWN + "output.png"]},
        },
        {"image_count_input": None, "max_images": 1, "client_inputs": ["image_size"]},
    ),
    (
        {"inputs": PROMPT | {"image_size": {"enum": ["for_speed", "for_quality"]}}, "output": TWO},
        {"client_inputs": ["image_size"], "max_images": 1},
    ),
    (
        {"name": "flux-cute-3d", "default_example": {"output": [SHOWN + "out-0.webp"]}},
        {"outputs_path": None},
    ),
    (
        {"inputs": {"content": URI, "style": URI}, "required": ["content", "style"]},
        {"image_inputs": ["content", "style"], "prompt_input": None},
    ),
    # Pictures that grow, one of several that are named, and one that comes first.
    (
        {"output": TWO | {"x-cog-array-type": "iterator"}},
        {"outputs_path": "$.output[last - $count + 1 to last]"},
    ),
    (
        {
            "output": TEXT,
            "default_example": {"output": {"mask": SHOWN + "1.png", "out": SHOWN + "2.png"}},
        },
        {"outputs_path": '$.output."out"'},
    ),
    (
        {"output": TWO, "default_example": {"output": [SHOWN + "out.png", SHOWN + "mask.png"]}},
        {"outputs_path": None},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("said", "row"), REAL, ids=str)
def test_the_example_tells_what_is_made_and_which_of_several_outputs_is_the_picture(said, row):
    found = map_model(replicate_model(**{"inputs": PROMPT} | said))

    assert found.items() >= row.items()


def test_an_image_model_of_fal_becomes_a_row_too(db):
    inputs = PROMPT | {
        "image_url": TEXT | {"description": "URL of the picture"},
        "image_size": any_of({"$ref": REF + "ImageSize"}, {"enum": ["square_hd", "landscape_4_3"]}),
        "num_images": INT | {"minimum": 1, "maximum": 4, "default": 1},
        "sync_mode": BOOLEAN,
        "enable_safety_checker": BOOLEAN | {"default": True},
        "loras": {"type": "array", "items": {"type": "object"}},
    }
    model = fal_model("fal-ai/flux/dev", inputs, required=["prompt"])

    changed = import_model(db, model, price_credits=5)

    assert {name: value for name, (_, value) in changed.items()}.items() >= {
        "id": "fal-ai/flux-dev",
        "provider": "fal",
        "provider_ref": "fal-ai/flux/dev",
        "client_inputs": ["image_size", "image_url", "num_images"],
        "image_inputs": ["image_url"],
        "image_count_input": "num_images",
        "max_images": 4,
    }.items()
    assert changed["input_schema"][1]["properties"]["image_size"]["enum"][0] == "square_hd"
    assert "outputs_path" not in changed
    with unchanged(db):
        assert import_model(db, {"models": [model]}) == {}
        assert import_model(db, model["openapi"]) == {}
        with pytest.raises(ValueError, match=r"is there already: fal's fal-ai/flux/dev, not"):
            import_model(db, fal_model("fal-ai/flux-dev", inputs))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (fal_model("fal-ai/veo", PROMPT, category="text-to-video"), "it is for text-to-video"),
        (fal_model("fal-ai/x", PROMPT, {"model_file": "File"}), "its output holds no image"),
        (fal_model("fal-ai/x", PROMPT, {"seed": "Seed"}), "its output is text"),
        ({"models": []}, "no endpoint_id"),
        (fal_model("fal-ai", PROMPT), "no endpoint_id"),
        ({"endpoint_id": "fal-ai/x", "openapi": {"error": {}}}, "no OpenAPI document"),
    ],
)
def test_what_fal_says_of_other_media_is_refused(model, reason):
    with pytest.raises(ValueError, match=reason):
        map_model(model)


@pytest.mark.parametrize("output", OUTPUTS, ids=str)
def test_an_output_that_may_hold_images_is_accepted(output):
    model = replicate_model({}, output, schemas=PARTS)
    del model["latest_version"]["openapi_schema"]["components"]["schemas"]["Input"]["properties"]

    assert map_model(model)["input_schema"] == {"required": [], "properties": {}}


A, B, TREE = ({"$ref": REF + name} for name in ("A", "B", "Tree"))
CIRCLE = {"A": {"type": "array", "items": B}, "B": any_of(A, NULL)}
TREES = {"Tree": {"type": "object", "properties": {"child": TREE}}}
BAD = [
    ({"output": TEXT}, "its output is text"),
    ({"output": {"type": "array", "items": TEXT}}, "its output is text"),
    ({"output": {"type": "array", "items": NUMBER}}, "its output is a number"),
    ({"output": {"type": "object", "properties": {"answer": TEXT}}}, "its output is text"),
    ({"output": {"type": "object", "properties": {"weights": URI}}}, "its output holds no image"),
    ({"output": URI | {"title": "Video"}}, "its output is video"),
    ({"output": URI | {"description": "The audio file"}}, "its output is audio"),
    ({"name": "stable-video-diffusion"}, "its output is video"),
    ({"description": "A great text-to-video model"}, "its output is video"),
    ({"description": "Masked Audio Generation"}, "its output is audio"),
    ({"inputs": {"num_frames": INT}}, "its output is video"),
    ({"inputs": {"clip": INT | {"description": "Seconds of video"}}}, "its output is video"),
    (
        {
            "description": "Higher-fidelity video, context-aware audio, reference image",
            "inputs": {
                "image": URI | {"description": "Input image"},
                "prompt": TEXT | {"description": "Text prompt for video generation"},
                "generate_audio": BOOLEAN | {"description": "Generate audio with the video"},
            },
        },
        "its output is video",
    ),
    ({"default_example": {"output": ["https://a.example/b.mp4?c.png"]}}, "its output is mp4"),
    ({"default_example": {"output": "https://a.example/b.safetensors"}}, "is safetensors"),
    ({"default_example": {"output": {"mesh": "https://a.example/b.glb"}}}, "its output is glb"),
    (
        {"output": None, "default_example": {"output": {"video": "https://a.example/b.webp"}}},
        "its output holds no image",
    ),
    ({"inputs": {"format": {"enum": ["mp3", "wav"]}}}, "its output is mp3"),
    ({"inputs": {"size": A}}, "#/components/schemas/A leads nowhere"),
    ({"inputs": {"size": {"$ref": "https://a.example/b.json"}}}, "b.json leads nowhere"),
    ({"inputs": {"a": A}, "schemas": {"A": A}}, "leads round in circles"),
    ({"inputs": {"a": A}, "schemas": CIRCLE}, "leads round in circles"),
    ({"output": TREE, "schemas": TREES}, "leads round in circles"),
    ({"inputs": {"api_key": TEXT}, "required": ["api_key"]}, "input api_key is required"),
    ({"inputs": {"video": URI}, "required": ["video"]}, "input video is required"),
    ({"latest_version": None}, "latest_version"),
    ({"latest_version": {"id": "1"}}, "latest_version"),
    ({"owner": None}, "owner and name"),
    ({"name": "a model"}, "owner and name"),
    ({"options": {"allow_inputs": ["nonsense"]}}, "it has no input nonsense"),
    ({"options": {"price": 3}}, "options.price: not an option"),
    ({"options": {"id": "some/other"}}, "options.id: not an option"),
]  # fmt: skip


def imported(db, inputs=PROMPT, options=None, **model):
    return import_model(db, replicate_model(inputs, **model), **options or {})


@pytest.mark.parametrize(("given", "reason"), BAD, ids=str)
def test_what_cannot_be_mapped_is_refused_with_the_reason(db, given, reason):
    with unchanged(db), pytest.raises(ValueError, match=rf"^(model: )?.*{reason}"):
        imported(db, **given)


@pytest.mark.parametrize(
    ("said", "versioned"),
    [
        ({"is_official": True}, False),
        ({"is_official": False, "default_example": {"metrics": {"image_count": 1}}}, True),
        ({"default_example": {"metrics": {"image_count": 1}}}, False),
        ({"default_example": {"metrics": {"predict_time": 1}}}, True),
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
        "seed": INT,
        "image": URI,
        "num_outputs": INT | {"minimum": 1, "maximum": 4},
        "disable_safety_checker": BOOLEAN | {"default": False},
    },
    required=["prompt"],
)


def test_a_new_model_is_not_for_sale_until_it_has_a_price(db):
    with unchanged(db):
        shown = import_model(db, MODEL, dry_run=True)

    unpriced = import_model(db, MODEL)
    priced = import_model(db, MODEL | {"name": "another"}, price_credits=3)

    assert shown == unpriced
    assert unpriced["is_active"] == (None, False)
    assert (priced["is_active"], priced["paid_price_credits"]) == ((None, True), (None, 3))
    assert priced["title"] == (None, "Another")


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
    with unchanged(db):
        assert import_model(db, MODEL) == {}
    newer = copy.deepcopy(MODEL)
    model_inputs(newer)["steps"] = INT

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


def test_an_input_the_operator_sets_is_not_the_clients_and_may_be_required(db):
    model = replicate_model(PROMPT | {"seed": INT, "api_key": TEXT}, required=["api_key"])

    changed = import_model(db, model, operator_input={"seed": 7, "api_key": "k"})

    assert changed["client_inputs"][1] == []


@pytest.mark.parametrize("model", recorded_models(), ids=model_id)
def test_the_seed_holds_what_the_recorded_models_say_and_they_can_be_entered_anew(db, model):
    with unchanged(db):
        assert import_model(db, model) == {}
    before = db.row("select * from public.models where id = %s", model_id(model))
    db.execute("delete from public.models where id = %s", model_id(model))

    import_model(db, model)

    after = db.row("select * from public.models where id = %s", model_id(model))
    same = {"input_schema", "prompt_input", "image_inputs", "image_count_input", "provider_ref"}
    assert {name: after[name] for name in same} == {name: before[name] for name in same}
