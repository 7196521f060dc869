"""Map a provider's own description of a model to a row of the catalogue.

`map_model` takes what Replicate's GET /models/{owner}/{name} answers. Its schema becomes rules and
nothing else: references resolved, prose left out, limits added where the provider left a size or a
length of work open. What an input is for is told by its name, its rules and its prose. Inputs that
only an operator may set (safety switches, weights, secrets, anything that takes an address) never
become a client's unless the operator says so by name. Inputs that take an image do: a client gives
a path in bucket inputs, never an address. Where in doubt an input is the operator's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

Schema = dict[str, Any]

MAX_DEPTH = 20
MAX_IMAGES = 16
NUMBERS = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    *("minLength", "maxLength", "minItems", "maxItems"),
)
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array"}
# Limits where the provider sets none: of an integer or number whose name says this.
LIMITS: list[tuple[str, float | None, float]] = [
    (r"((image|img|output|out|target|canvas|new|max)_)?(width|height)", 64, 2048),
    (
        r"(.*_)?(width|height|resolution|dimensions?|side|pixels|(image|img|max|output)_size)|size",
        None,
        2048,
    ),
    (r"(up|out|re)?scal(e|ing)(_(factor|by|ratio))?", 0, 10),
    (r"(.*_)?(megapixels?|mp)", None, 4),
    (r"(.*_)?steps", 0, 500),
]
FILE_FORMAT = re.compile(r"uri|url|uri-reference|iri|binary|byte|path")
NO_IMAGE_NAME = re.compile(
    r"(^|_)(loras?|weights?|checkpoint|ckpt|zip|archive|dataset|prompt_file)(_|$)"
)
NO_IMAGE_PROSE = re.compile(r"\b(zip|tar|tarball|safetensors|videos?|audio)\b")
IMAGE_NAME = re.compile(
    r"image|img|mask|photo|picture|pic|face|pose|sketch|portrait|selfie|drawing"
    r"|^(input|source|target|init|control|reference|subject|character|person|style)$"
)
IMAGE_PROSE = re.compile(
    r"\b(images?|pictures?|photos?|photographs?|png|jpe?g|drawing|sketch|selfie)\b"
)
IMAGE_FOR_SURE = re.compile(
    r"((input|source|src|init|start|reference|ref|base|style|control|target|mask|face)_)?"
    r"(images?|imgs?|photos?|pictures?|mask)(_(\d+|path|file|input|urls?|uris?))?"
)
OPERATORS_NAME = re.compile(
    r"safe|nsfw|sfw|moderat|censor|watermark|content_(filter|check|policy)|filter_(level|words)"
    r"|disable_filter|profan|explicit|adult|mature|nud(e|ity)|person_generation|guardrail"
    r"|(^|_)(webhooks?|callbacks?|secrets?|password|passwd|credentials?|token"
    r"|api|apikey|key|auth|authorization|bearer|urls?|uris?|hrefs?|links?|endpoint|proxy|host|hf"
    r"|huggingface|civitai|replicate|openai|debug|workflow|kwargs|command|extra_args)(_|$)"
)
SIZE_NAME = re.compile(r"(image_|output_)?(size|resolution|dimensions?)")
# Whom the provider is to hold responsible is not for that person to say.
END_USER = re.compile(
    r"(^|_)(end_?)?(users?|customers?|clients?|accounts?|members?|tenants?|visitors?|sessions?"
    r"|devices?|requesters?|organi[sz]ations?|fingerprints?|e?mails?|usernames?|ip)"
    r"(_?(u?u?ids?|identifi(er|cation)s?|names?|e?mails?|ip|address|hash(es)?|keys?|refs?"
    r"|reference|tags?|tokens?|info|data|metadata))?$"
)
END_USER_PROSE = re.compile(r"\b(end|your)[- ]?(users?|customers?)\b")
ADDRESS_PROSE = re.compile(r"\b(urls?|uris?|hyperlink|hugging ?face|civitai|safetensors|api key)\b")
ADDRESS_NAME = re.compile(
    r"(^|_)(model|repo|path|file|filename|dir|directory|folder|zip|tar|adapter|embeddings?"
    r"|loras?|qlora|weights?|checkpoints?|ckpt|json|yaml|config|script|bucket)(_|$)"
)
PROMPTS = [
    "prompt", "text_prompt", "prompt_text", "input_prompt", "positive_prompt", "user_prompt",
    "main_prompt", "prompts", "edit_prompt", "prompt_1", "prompt1", "instruction",
    "instructions", "edit_instruction", "positive", "text", "input_text", "text_input",
    "caption", "description", "query", "message", "input", "content",
]  # fmt: skip
NO_PROMPT = re.compile(r"(negative|neg|^n_|system|style|lora|suffix|prefix|2|strength)")
COUNTS = [
    "num_outputs", "number_of_outputs", "number_of_images", "num_images",
    "num_images_per_prompt", "n_images", "images_per_prompt", "num_samples", "n_samples",
    "samples", "n", "max_images", "batch_size",
]  # fmt: skip
COUNT_NAME = re.compile(
    r"n|amount|quantity|outputs|samples|variations|batch|n_iter|max_images"
    r"|(num|number|n|no|count|amount|total|nb)_(of_)?(output|generated|result)?_?"
    r"(image|output|sample|picture|result|generation|variation|variant|prediction|batche?)s?"
    r"(_per_[a-z]+)?"
    r"|(image|output|sample|batch|picture|result|variation|generation)s?_(count|num|number|size|n)"
    r"|(images|samples)_per_prompt"
)
NO_IMAGE_KEY = re.compile(
    r"video|audio|mp4|mp3|wav|weights|model|mesh|glb|zip|npz|text|json|log", re.IGNORECASE
)
MEDIUM = re.compile(r"\b(videos?|mp4|webm|audio|wav|mp3|music|songs?|speech|voice|sound|3d|mesh)\b")
MAKES_MEDIUM = [
    re.compile(r"\b(?:to|2)[- ]?(video|audio|speech|music|3d)\b"),
    re.compile(
        r"\b((?:video|audio|music|speech) generation|generative (?:video|audio|music)"
        r"|sound effects)\b"
    ),
    re.compile(
        r"\b(?:generat|creat|mak)(?:es?|ing) (?:[a-z-]+ ){0,3}(videos?|music|songs?|audio)\b"
    ),
]


class Unmappable(ValueError):
    """The model cannot become a row; the message says why."""


# --- schemas ------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether JSON calls it a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def type_of(node: Schema) -> str | None:
    """Name the type a node says, or its enum or constant shows."""
    if isinstance(node.get("type"), str):
        return str(node["type"])
    enum = node.get("enum")
    values = [each for each in enum if each is not None] if isinstance(enum, list) else []
    numbers = [each for each in values if is_number(each)]
    if numbers and all(each % 1 == 0 for each in numbers):
        return "integer"
    if numbers and numbers[0] is values[0]:
        return "number"
    for value in [*values[:1], *([node["const"]] if "const" in node else [])]:
        return TYPES.get(type(value), "object")
    return None


def rules_of(node: Schema) -> Schema:
    """Answer what of a resolved node is a rule and well formed.

    Null is no value: an enum that holds it is nullable, a default of null is none.
    """
    enum = node.get("enum") if isinstance(node.get("enum"), list) else []
    rules: Schema = {
        name: node.get(name)
        for name in NUMBERS
        if is_number(node.get(name)) and (name != "multipleOf" or node[name] > 0)
    }
    for name, kind in (("items", dict), ("properties", dict), ("anyOf", list)):
        if isinstance(node.get(name), kind):
            rules[name] = node[name]
    secret = node.get("writeOnly") is True or node.get("x-cog-secret") is True
    rules |= {
        "default": node.get("default"),
        "type": type_of(node),
        "nullable": True if node.get("nullable") is True or None in (enum or []) else None,
        "enum": [each for each in enum or [] if each is not None]
        or ([node["const"]] if "const" in node else None),
        "format": "password" if secret else node.get("format"),
    }
    for name, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if node.get(name) is True:  # OpenAPI 3.0 says so that the limit itself is out
            rules[name] = node.get(limit)
    return {name: value for name, value in rules.items() if value is not None}


def resolve(node: Any, schemas: Schema, path: tuple[str, ...] = ()) -> Schema:
    """Answer one part of a schema as rules: $ref, allOf and unions resolved. Raises Unmappable."""
    node = dict(node) if isinstance(node, dict) else {}
    ref = node.get("$ref")
    found = re.match(r"#/(?:components/schemas|\$defs|definitions)/(.+)$", str(ref))
    name = found[1] if found else None
    if ref is not None and name not in schemas:
        raise Unmappable(f"{ref} leads nowhere")
    if name in path or len(path) > MAX_DEPTH:
        raise Unmappable(f"{ref or 'it'} leads round in circles")
    path = (*path, name or "")
    all_of = node.get("allOf")
    for part in [*([schemas[name]] if name else []), *(all_of if type(all_of) is list else [])]:
        node = resolve(part, schemas, path) | node
    own = {key: value for key, value in node.items() if key not in ("anyOf", "oneOf")}
    if isinstance(own.get("type"), list):
        del own["type"]
    node = resolve_union(node, schemas, path) | own
    if isinstance(node.get("items"), dict):
        node["items"] = resolve(node["items"], schemas, path)
    if isinstance(node.get("properties"), dict):
        node["properties"] = {
            key: resolve(value, schemas, path) for key, value in node["properties"].items()
        }
    return rules_of(node)


def resolve_union(node: Schema, schemas: Schema, path: tuple[str, ...]) -> Schema:
    """Answer what a union (anyOf, oneOf, an array of types) says; nothing if there is none.

    Of one type and null, that type, nullable; of enums, one enum; of several types, anyOf.
    """
    options: list[tuple[Schema, bool]] = [
        (resolve(each, schemas, path), isinstance(each, dict) and each.get("type") == "null")
        for union in ("anyOf", "oneOf")
        if isinstance(node.get(union), list)
        for each in node[union]
    ]
    if isinstance(node.get("type"), list):
        options += [(rules_of(node | {"type": each}), each == "null") for each in node["type"]]
    real = [rules for rules, is_null in options if not is_null]
    nullable: Schema = {"nullable": True} if len(real) < len(options) else {}
    if len(real) <= 1:
        return (real[0] if real else {}) | nullable
    kinds = {str(rules.get("type")) for rules, _ in options}
    if all("enum" in rules for rules, _ in options) and len(kinds) == 1:
        return {"enum": [value for rules in real for value in rules["enum"]]} | nullable
    return {"anyOf": real} | nullable


def nodes(rules: Any) -> Iterator[Schema]:
    """Yield the rules themselves and all rules in them."""
    if isinstance(rules, dict):
        yield rules
    for part in rules.values() if isinstance(rules, dict) else rules:
        if isinstance(part, dict | list):
            yield from nodes(part)


def limited(snake: str, rules: Schema, takes_image: bool) -> Schema:
    """Add limits where the provider left a size or a length of work open.

    A default that does not fit goes, and one of an image input: there, clients give paths.
    """
    default = rules.get("default")
    if "enum" not in rules and rules.get("type") in ("integer", "number"):
        number = default if is_number(default) else None
        for pattern, low, high in LIMITS:
            if re.fullmatch(pattern, snake):
                lows = (low, number, rules.get("maximum"))
                highs = (high, number, rules.get("minimum"))
                if low is not None:
                    rules = {"minimum": min(each for each in lows if each is not None)} | rules
                rules = {"maximum": max(each for each in highs if each is not None)} | rules
                break
    rest = {name: value for name, value in rules.items() if name != "default"}
    if default is None or takes_image or not Draft202012Validator(rest).is_valid(default):
        return rest
    return rest | {"default": int(default) if rules.get("type") == "integer" else default}


# --- inputs -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Property:
    """One input of a model."""

    name: str
    snake: str  # its words: imageURL, Image-URL and image_url are the same
    rules: Schema
    is_required: bool
    takes_image: bool
    is_operators: bool
    counts_images: bool


def is_free_text(rules: Schema) -> bool:
    """Whether it takes text of any kind: names, paths and addresses too."""
    return any(each.get("type") == "string" and "enum" not in each for each in nodes(rules))


def takes_file(rules: Schema) -> bool:
    """Whether it takes a file, as one or as a list."""
    return any(FILE_FORMAT.fullmatch(str(each.get("format"))) for each in nodes(rules))


def is_image(snake: str, rules: Schema, prose: str) -> bool:
    """Whether it takes source images: a file, or plain text where the name leaves no doubt."""
    if not is_free_text(rules) or NO_IMAGE_NAME.search(snake) or NO_IMAGE_PROSE.search(prose):
        return False
    looks_so = IMAGE_NAME.search(snake) or IMAGE_PROSE.search(prose)
    return bool((takes_file(rules) and looks_so) or IMAGE_FOR_SURE.fullmatch(snake))


def is_operators(snake: str, rules: Schema, prose: str) -> bool:
    """Whether it is the operator's by its name, its type, or as text that is an address."""
    kind, items = rules.get("type"), rules.get("items")
    is_untyped = (
        not {"type", "anyOf"} & rules.keys()
        or any("type" not in each for each in rules.get("anyOf", []))
        or (kind == "array" and items is None)
        or (items is not None and items.get("type", "array") == "array")
    )
    is_text = is_free_text(rules)
    return bool(
        OPERATORS_NAME.search(snake)
        or END_USER.search(snake)
        or is_untyped
        or takes_file(rules)
        or any(e.get("format") == "password" or e.get("type") == "object" for e in nodes(rules))
        or (SIZE_NAME.fullmatch(snake) and (kind == "array" or is_text))
        or (
            is_text
            and "prompt" not in snake
            and (
                ADDRESS_PROSE.search(prose)
                or END_USER_PROSE.search(prose)
                or ADDRESS_NAME.search(snake)
            )
        )
    )


def read_properties(schemas: Schema) -> list[Property]:
    """List the inputs in the order of their names. Raises Unmappable."""
    properties: list[Property] = []
    required = schemas["Input"].get("required")
    for name, schema in sorted(schemas["Input"]["properties"].items()):
        snake = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
        snake = re.sub(r"[\W_]+", "_", snake).lower().strip("_")
        rules = resolve(schema, schemas)
        rules.pop("properties", None)
        said = schema.get("description") if isinstance(schema, dict) else None
        prose = re.sub(r"https?://\S+", "", str(said or "").lower())  # not what the input takes
        takes_image = is_image(snake, rules, prose)
        properties.append(
            Property(
                name,
                snake,
                limited(snake, rules, takes_image),
                isinstance(required, list) and name in required,
                takes_image,
                is_operators(snake, rules, prose),
                not is_free_text(rules) and bool(COUNT_NAME.fullmatch(snake)),
            )
        )
    return properties


def find_prompt(properties: list[Property]) -> str | None:
    """Name the input that the prompt goes into: by its name, or the one required text called so.

    Names that say little count where the model cannot do without, or is given nothing else.
    """
    has_image = any(each.takes_image for each in properties)
    found = [
        each
        for each in properties
        if each.rules.get("type") == "string"
        and not {"enum", "format"} & each.rules.keys()
        and not each.takes_image
        and (
            ("prompt" in each.snake and not NO_PROMPT.search(each.snake))
            or (each.snake in PROMPTS and (each.is_required or not has_image))
        )
    ]
    found.sort(key=lambda each: (place(each, PROMPTS), not each.is_required, each.name))
    return found[0].name if found else None


def place(of: Property, names: list[str]) -> int:
    """Tell the place of an input's name in a list, or its end."""
    return names.index(of.snake) if of.snake in names else len(names)


def find_count(properties: list[Property]) -> tuple[str | None, Schema]:
    """Name the input that says how many images, with its rules and limits we can charge by.

    Only one of a model's may be a client's: what the others multiply is not charged.
    """
    found = [
        each
        for each in properties
        if each.rules.get("type") == "integer" and each.counts_images and not each.is_operators
    ]
    if not found:
        return None, {}
    count = min(found, key=lambda each: (place(each, COUNTS), each.name))
    rules = {name: value for name, value in count.rules.items() if name != "nullable"}
    if "enum" in rules:
        return count.name, {"default": rules["enum"][0]} | rules
    default = rules.get("default", 1)
    low = min(MAX_IMAGES, max(1, rules.get("minimum", 1)))
    high = rules.get("maximum", max(4, default))
    return count.name, {
        name: value
        for name, value in rules.items()
        if name not in ("exclusiveMinimum", "exclusiveMaximum")
    } | {
        "minimum": low,
        "maximum": max(low, min(MAX_IMAGES, high)),
        "default": min(MAX_IMAGES, max(low, default)),
    }


# --- outputs ------------------------------------------------------------------------------------


def check_output(model: Schema, schemas: Schema) -> None:
    """Refuse a model whose output is nothing we can store as images. Raises Unmappable."""
    output = resolve(schemas.get("Output"), schemas)
    kind = output.get("items", {}).get("type", output.get("type"))
    if kind in ("number", "integer", "boolean", "null"):
        raise Unmappable(f"its output is a {kind}, not an image")
    has_text = any(each.get("type") == "string" for each in nodes(output))
    if has_text and not takes_file(output):
        raise Unmappable("its output is text, not an image")
    if (parts := output.get("properties")) is not None:
        if all("type" in each for each in parts.values()) and not takes_file(output):
            raise Unmappable("its output holds no file")
        if all(NO_IMAGE_KEY.search(name) for name in parts):
            raise Unmappable("its output holds no image")
    if medium := MEDIUM.search(output_prose(model, schemas)):
        raise Unmappable(f"its output is {medium[1]}, not an image")


def output_prose(model: Schema, schemas: Schema) -> str:
    """Gather what tells of videos and sounds where the output's type is a mere address.

    The name, a sentence such as text-to-video, frames per second among the inputs.
    """
    output = schemas["Output"] if isinstance(schemas.get("Output"), dict) else {}
    said = str(model.get("description") or "").lower()
    words = [re.sub(r"[-_.]", " ", str(model["name"])), output.get("title")]
    words.append(output.get("description"))
    words += [found[1] for found in (each.search(said) for each in MAKES_MEDIUM) if found]
    inputs = schemas["Input"]["properties"]
    texts = {str(value) for each in nodes(inputs) for value in leaves(each)}
    if {"fps", "num_frames", "frames_per_second", "video_length"} & inputs.keys():
        if not any(re.search(r"\bgif\b", each, re.IGNORECASE) for each in leaves(schemas)):
            words.append("video")
    elif not texts & {"png", "jpg", "jpeg", "webp", "gif"}:
        words += sorted(texts & {"mp4", "webm", "mp3", "wav"})
    return " ".join(str(each) for each in words if each).lower()


def leaves(value: Any) -> Iterator[str]:
    """Yield every text in it: names and values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for each in value.values():
            yield from leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from leaves(each)


# --- the whole ----------------------------------------------------------------------------------


def read_schemas(model: Schema) -> Schema:
    """Answer a model's schemas: Input, Output, and what they refer to. Raises Unmappable."""
    schemas: Any = model
    for name in ("latest_version", "openapi_schema", "components", "schemas"):
        schemas = schemas.get(name) if isinstance(schemas, dict) else None
    if not isinstance(schemas, dict) or not isinstance(schemas.get("Input"), dict):
        raise Unmappable("it has no latest_version.openapi_schema with an Input")
    inputs = schemas["Input"]
    if not isinstance(inputs.get("properties"), dict):
        inputs = inputs | {"properties": {}}
    defs = inputs["$defs"] if isinstance(inputs.get("$defs"), dict) else {}
    return defs | schemas | {"Input": inputs}


def map_model(model: Any) -> Schema:
    """Answer the columns of a catalogue row that the provider's description determines.

    An official model is called by its name, any other by its version; where the description does
    not say, an official one shows by the images it bills. Raises Unmappable, with the reason.
    """
    model = model if isinstance(model, dict) else {}
    name = f"{model.get('owner')}/{model.get('name')}"
    if not (model.get("owner") and re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", name)):
        raise Unmappable("it has no owner and name as Replicate writes them")
    schemas = read_schemas(model)
    check_output(model, schemas)
    properties = read_properties(schemas)
    prompt = find_prompt(properties)
    count, count_rules = find_count(properties)
    version = (model.get("latest_version") or {}).get("id")
    metrics = (model.get("default_example") or {}).get("metrics") or {}
    is_official = model.get("is_official")
    if is_official is None:
        is_official = bool({"image_count", "image_output_count"} & metrics.keys())
    return {
        "id": name.lower(),
        "provider": "replicate",
        "provider_ref": name if is_official or not version else f"{name}:{version}",
        "prompt_input": prompt,
        "image_count_input": count,
        "max_images": min(
            MAX_IMAGES, max(count_rules.get("enum") or [count_rules.get("maximum", 1)])
        ),
        "image_inputs": [each.name for each in properties if each.takes_image],
        "client_inputs": [
            each.name
            for each in properties
            if each.name != prompt
            and (each.takes_image or not each.is_operators)
            and (each.name == count or not each.counts_images)
        ],
        "input_schema": {
            "required": [each.name for each in properties if each.is_required],
            "properties": {
                each.name: count_rules if each.name == count else each.rules for each in properties
            },
        },
    }
