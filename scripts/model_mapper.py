"""Map a provider's own description of a model to a row of the catalogue.

`map_model` takes what Replicate's GET /models/{owner}/{name} answers, or fal's
GET /models?endpoint_id=…&expand=openapi-3.0, one model of it, or its OpenAPI document alone. The
schema becomes rules and nothing else: references resolved, prose left out, limits added where the
provider left a size or a length of work open. What is made, and which of several outputs is the
picture, the example tells that comes with the model; words only where there is none. What an input
is for is told by its name, its rules, its prose and its example. Inputs that only an operator may
set (safety switches, weights, secrets, anything that takes an address) never become a client's
unless the operator says so by name. Inputs that take an image do: a client gives a path in bucket
inputs, never an address. Where in doubt an input is the operator's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
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
PICTURE_FILE = re.compile(r"png|jpe?g|jfif|webp|gif|avif|svg|bmp|tiff?|heic")
# Other media, and pictures. What is said more often is made.
MEDIUM = re.compile(
    r"\b(videos?|mp4|webm|audio|wav|mp3|music|songs?|speech|voices?|sounds?|3d|mesh)\b"
)
IMAGE = re.compile(r"\b(images?|pictures?|photos?|photographs?|png|jpe?g|webp|gif|svg)\b")
# Names of outputs that are no picture, and of what is answered beside it.
NO_PICTURE = re.compile(
    r"video|audio|mp4|mp3|wav|weights|lora|model|mesh|glb|zip|npz|text|json|log|config", re.I
)
ASIDE = re.compile(r"mask|map|control|canny|depth|edge|pose|grid|input|original|debug", re.I)
NO_IMAGE_NAME = re.compile(
    r"(^|_)(loras?|weights?|checkpoint|ckpt|zip|archive|dataset|prompt_file|videos?|audio|models?"
    r"|embeddings?|fonts?|pdf)(_|$)"
)
NO_IMAGE_PROSE = re.compile(r"\b(zip|tar|tarball|safetensors|videos?|audio)\b")
# A text that takes an image: there the name alone must leave no doubt.
IMAGE_NAME = re.compile(
    r"([a-z0-9]+_)*(images?|imgs?|photos?|pictures?|masks?)(_(\d+|path|file|input|urls?|uris?))*"
)
OPERATORS_NAME = re.compile(
    r"safe|nsfw|sfw|moderat|censor|watermark|content_(filter|check|policy)|filter_(level|words)"
    r"|disable_filter|profan|explicit|adult|mature|nud(e|ity)|person_generation|guardrail"
    r"|(^|_)(webhooks?|callbacks?|secrets?|password|passwd|credentials?|token"
    r"|api|apikey|key|auth|authorization|bearer|urls?|uris?|hrefs?|links?|endpoint|proxy|host|hf"
    r"|huggingface|civitai|replicate|openai|debug|workflow|kwargs|command|extra_args"
    r"|sync_mode)(_|$)"
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
NO_PROMPT = re.compile(r"(negative|neg|^n_|system|style|lora|suffix|prefix|2|strength)")
COUNT_NAME = re.compile(
    r"n|amount|quantity|outputs|samples|variations|batch(_size)?|n_iter|max_images"
    r"|(num|number|n|no|count|amount|total|nb)_(of_)?(output|generated|result)?_?"
    r"(image|output|sample|picture|result|generation|variation|variant|prediction|batche?)s?"
    r"(_per_[a-z]+)?"
    r"|(image|output|sample|batch|picture|result|variation|generation)s?_(count|num|number|n)"
    r"|(images|samples)_per_prompt"
)
# Counts that may multiply another one.
FACTOR = re.compile(r"batch|per_|iter|max")


class Unmappable(ValueError):
    """The model cannot become a row; the message says why."""


# --- JSON ---------------------------------------------------------------------------------------


def read_number(text: str) -> float:
    """Read 4.0 as 4."""
    number = float(text)
    return int(number) if number.is_integer() else number


def as_dict(value: Any) -> Schema:
    """Answer an object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def dig(value: Any, *keys: str) -> Any:
    """Answer what is at a path of keys; None if it does not lead there."""
    for key in keys:
        value = as_dict(value).get(key)
    return value


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


def file_kind(text: str) -> str | None:
    """Tell the kind of file at an address, png say; None where it does not say or is none."""
    found = re.match(r"data:\w+/(\w+)|\w+://[^?#\s]*\.(\w{2,12})([?#]|$)", text)
    return (found[1] or found[2]).lower() if found else None


def is_picture(value: Any) -> bool:
    """Whether it is, or holds, a picture's address."""
    return any(PICTURE_FILE.fullmatch(file_kind(each) or "") for each in leaves(value))


# --- schemas ------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether JSON calls it a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def values_of(node: Schema) -> list[Any]:
    """List the values that a node allows by name; none if it does not say."""
    enum = node.get("enum") if isinstance(node.get("enum"), list) else []
    values = [each for each in enum or [] if each is not None]
    return values or ([node["const"]] if "const" in node else [])


def type_of(node: Schema) -> str | None:
    """Name the type a node says, or the values that it allows show."""
    if isinstance(node.get("type"), str):
        return str(node["type"])
    types = list(dict.fromkeys(map(type, values_of(node))))
    if types[:1] == [int] and float in types:
        return "number"
    return TYPES.get(types[0], "object") if types else None


def rules_of(node: Schema) -> Schema:
    """Answer what of a resolved node is a rule and well formed.

    Null is no value: an enum that holds it is nullable, a default of null is none.
    """
    has_null = isinstance(node.get("enum"), list) and None in node["enum"]
    rules: Schema = {
        name: node[name]
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
        "nullable": True if node.get("nullable") is True or has_null else None,
        "enum": values_of(node) or None,
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

    Of one type and null, that type, nullable; of enums, one enum; of several types, anyOf, but of a
    list of choices and what leaves all open (any text, an object), the list.
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
    if any("enum" in rules for rules in real):
        real = [r for r in real if "enum" in r or r.get("type") in ("integer", "number", "boolean")]
    if len(real) <= 1:
        return (real[0] if real else {}) | nullable
    if (
        all("enum" in rules for rules in real)
        and len({str(rules.get("type")) for rules in real}) == 1
    ):
        return {"enum": [value for rules in real for value in rules["enum"]]} | nullable
    return {"anyOf": real} | nullable


def nodes(rules: Schema) -> Iterator[Schema]:
    """Yield the rules themselves and all rules in them."""
    yield rules
    inner = [rules.get("items"), *rules.get("anyOf", []), *rules.get("properties", {}).values()]
    for each in inner:
        if isinstance(each, dict):
            yield from nodes(each)


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
    return rest | {"default": default}


# --- what providers say -------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What any provider says about a model."""

    provider: str
    ref: str  # what the provider calls it
    id: str
    schemas: Schema
    inputs: Schema
    output: Any
    output_at: str  # SQL/JSON path of one of several outputs, {}, in the provider's answer
    prose: list[Any]
    known_outputs: tuple[str, ...] = ()  # where the provider's recipe looks
    is_for_images: bool = False  # the provider says so
    example: Schema = field(default_factory=dict)  # {input, output}


def read_replicate(said: Schema) -> Model:
    """Read what Replicate says. Raises Unmappable.

    An official model is called by its name, any other by its version; where the description does
    not say, an official one shows by the images it bills.
    """
    name = f"{said.get('owner')}/{said.get('name')}"
    if not (said.get("owner") and re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", name)):
        raise Unmappable("it has no owner and name as Replicate writes them")
    schemas = as_dict(dig(said, "latest_version", "openapi_schema", "components", "schemas"))
    inputs = schemas.get("Input")
    if not isinstance(inputs, dict):
        raise Unmappable("it has no latest_version.openapi_schema with an Input")
    version = dig(said, "latest_version", "id")
    is_official = said.get("is_official")
    if is_official is None:
        metrics = as_dict(dig(said, "default_example", "metrics"))
        is_official = bool({"image_count", "image_output_count"} & metrics.keys())
    return Model(
        provider="replicate",
        ref=name if is_official or not version else f"{name}:{version}",
        id=name.lower(),
        schemas=as_dict(inputs.get("$defs")) | schemas,
        inputs=inputs,
        output=schemas.get("Output"),
        output_at="$.output.{}",
        prose=[re.sub(r"[-_.]", " ", str(said["name"])), said.get("description")],
        example=as_dict(said.get("default_example")),
    )


def read_fal(said: Schema) -> Model:
    """Read what fal says: its answer, one model of it, or the document alone. Raises Unmappable."""
    if isinstance(said.get("models"), list):
        said = as_dict(next(iter(said["models"]), None))
    document = as_dict(said.get("openapi")) or said
    about = as_dict(dig(document, "info", "x-fal-metadata")) | as_dict(said.get("metadata"))
    ref = str(said.get("endpoint_id") or about.get("endpointId"))
    if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)+", ref):
        raise Unmappable("it has no endpoint_id as fal writes them")
    category = about.get("category")
    if category and not str(category).endswith("-to-image"):
        raise Unmappable(f"it is for {category}")
    body = ("content", "application/json", "schema")
    inputs = dig(document, "paths", f"/{ref}", "post", "requestBody", *body)
    if not inputs:
        raise Unmappable(f"it has no OpenAPI document that says what to POST to /{ref}")
    result = (f"/{ref}/requests/{{request_id}}", "get", "responses", "200", *body)
    schemas = as_dict(dig(document, "components", "schemas"))
    owner, _, name = ref.lower().partition("/")
    return Model(
        provider="fal",
        ref=ref,
        id=f"{owner}/{name.replace('/', '-')}",
        schemas=schemas,
        inputs=schemas.get(str(inputs.get("$ref")).rsplit("/")[-1], inputs),
        output=dig(document, "paths", *result),
        output_at="$.{}.url",
        known_outputs=("image", "images"),
        is_for_images=bool(category),
        prose=[re.sub(r"[-_./]", " ", ref), about.get("display_name"), about.get("description")],
    )


def read_model(said: Any) -> Model:
    """Read what a provider says, which shows by its form. Raises Unmappable."""
    said = as_dict(json.loads(json.dumps(said), parse_float=read_number))
    is_fal = {"models", "endpoint_id", "openapi"} & said.keys()
    return read_fal(said) if is_fal else read_replicate(said)


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


def is_image(snake: str, rules: Schema, prose: str, example: Any) -> bool:
    """Whether it takes source images: as the example does, or else a file, or a text so called."""
    types = {each.get("type", "string") for each in nodes(rules)}
    if not is_free_text(rules) or types - {"string", "array"}:
        return False
    if kinds := [kind for kind in map(file_kind, leaves(example)) if kind]:
        return all(map(PICTURE_FILE.fullmatch, kinds))
    may_be = IMAGE_NAME.fullmatch(snake) or (takes_file(rules) and not NO_IMAGE_NAME.search(snake))
    return bool(may_be and not NO_IMAGE_PROSE.search(prose))


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


def read_properties(model: Model) -> list[Property]:
    """List the inputs in the order of their names. Raises Unmappable."""
    properties: list[Property] = []
    required = model.inputs.get("required")
    examples = as_dict(model.example.get("input"))
    for name, schema in sorted(as_dict(model.inputs.get("properties")).items()):
        snake = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name)
        snake = re.sub(r"[\W_]+", "_", snake).lower().strip("_")
        rules = resolve(schema, model.schemas)
        rules.pop("properties", None)
        said = str(as_dict(schema).get("description") or "").lower()
        prose = re.sub(r"https?://\S+", "", said)  # not what the input takes
        takes_image = is_image(snake, rules, prose, examples.get(name))
        properties.append(
            Property(
                name,
                snake,
                limited(snake, rules, takes_image),
                isinstance(required, list) and name in required,
                takes_image,
                is_operators(snake, rules, prose),
                bool(COUNT_NAME.fullmatch(snake)) and not is_free_text(rules),
            )
        )
    return properties


def find_prompt(properties: list[Property]) -> str | None:
    """Name the input that the prompt goes into: by its name, or else a text.

    A text of another name counts where the model cannot do without it, or is given nothing else.
    """
    has_image = any(each.takes_image for each in properties)
    found = [
        each
        for each in properties
        if each.rules.get("type") == "string"
        and not {"enum", "format"} & each.rules.keys()
        and not (each.takes_image or each.is_operators or NO_PROMPT.search(each.snake))
        and ("prompt" in each.snake or each.is_required or not has_image)
    ]
    found.sort(
        key=lambda each: (
            each.snake != "prompt", "prompt" not in each.snake, not each.is_required, each.name
        )
    )  # fmt: skip
    return found[0].name if found else None


def find_count(properties: list[Property]) -> tuple[str | None, Schema]:
    """Name the input that says how many images, with its rules and limits we can charge by.

    Only one of a model's may be a client's: what the others multiply is not charged.
    """
    found = [
        each
        for each in properties
        if each.counts_images
        and not each.is_operators
        and (each.rules.get("type") == "integer" or all_whole(each.rules.get("enum", [])))
    ]
    if not found:
        return None, {}
    count = min(found, key=lambda each: (bool(FACTOR.search(each.snake)), each.name))
    dropped = {"nullable", "exclusiveMinimum", "exclusiveMaximum"}
    rules = {name: value for name, value in count.rules.items() if name not in dropped}
    if "enum" in rules:
        return count.name, {"default": rules["enum"][0]} | rules
    default = rules.get("default", 1)
    low = min(MAX_IMAGES, max(1, rules.get("minimum", 1)))
    high = max(low, min(MAX_IMAGES, rules.get("maximum", max(4, default))))
    default = min(MAX_IMAGES, max(low, default))
    return count.name, rules | {"minimum": low, "maximum": high, "default": default}


def all_whole(values: list[Any]) -> bool:
    """Whether all of these, and there are some, are whole numbers or texts of one."""
    return bool(values) and all(str(each).isdecimal() for each in values)


def most_images(count_rules: Schema) -> int:
    """Tell the most images that a count may say, which may be text."""
    return min(MAX_IMAGES, max(map(int, count_rules.get("enum", [count_rules.get("maximum", 1)]))))


# --- outputs ------------------------------------------------------------------------------------


def find_outputs(
    model: Model, properties: list[Property], count: str | None, count_rules: Schema
) -> str | None:
    """Answer where in the provider's answer the pictures are, if not first among its outputs.

    Of a list that is longer than what was asked for, or grows while the work goes on, the last are
    meant, unless their names say otherwise. Raises Unmappable where no picture is made.
    """
    example, output = model.example.get("output"), resolve(model.output, model.schemas)
    is_shown = is_picture(example)
    if not is_shown:
        check_output(model, properties, output)
    shown = example if isinstance(example, list) and example else [example]
    one = as_dict(shown[0])
    if parts := output.get("items", output).get("properties") or one:
        found = [
            name
            for name, rules in parts.items()
            if (is_picture(one.get(name)) if is_shown else may_be_file(rules))
            and not NO_PICTURE.search(name)
        ]
        if not found:
            raise Unmappable("its output holds no image")
        name = min(found, key=lambda name: bool(ASIDE.search(name)))
        return None if name in model.known_outputs else model.output_at.format(json.dumps(name))
    said = str(dig(model.example, "input", str(count)) or count_rules.get("default"))
    asked = max(1, int(said)) if said.isdecimal() else 1
    grows = as_dict(model.output).get("x-cog-array-type") == "iterator"
    if (grows and not example) or len(shown) > asked:
        aside = [bool(ASIDE.search(str(each).rpartition("/")[2])) for each in shown]
        if grows or any(aside[:asked]) or not any(aside[-asked:]):
            return "$.output[last - $count + 1 to last]"
    return None


def may_be_file(rules: Schema) -> bool:
    """Whether an output can be a file: it has an address, or says nothing of its type."""
    is_open = not {"type", "anyOf", "enum"} & rules.keys()
    has_address = any("url" in each.get("properties", {}) for each in nodes(rules))
    return is_open or has_address or takes_file(rules)


def check_output(model: Model, properties: list[Property], output: Schema) -> None:
    """Refuse what makes no pictures, where no example shows one. Raises Unmappable.

    By the kind of file that the example shows; by the schema; and where that is a mere address, by
    what the model says of itself: more of images, or as much of another medium?
    """
    for kind in filter(None, map(file_kind, leaves(model.example.get("output")))):
        raise Unmappable(f"its output is {kind}, not an image")
    if not may_be_file(output):
        kind = output.get("items", output).get("type")
        what = "text" if kind in ("string", "object") else f"a {kind}"
        raise Unmappable(f"its output is {what}, not an image")
    said = [*model.prose, *(as_dict(model.output).get(key) for key in ("title", "description"))]
    for each in properties:
        if not takes_file(each.rules):
            said += [each.snake, dig(model.inputs, "properties", each.name, "description")]
            said += [kind for kind in each.rules.get("enum", []) if len(str(kind)) <= len("webm")]
    text = " ".join(str(each) for each in said if each).replace("_", " ").lower()
    media = MEDIUM.findall(re.sub(r"\b(fps|frames?)\b", "video", text))
    if media and len(media) >= len(IMAGE.findall(text)) and not model.is_for_images:
        raise Unmappable(f"its output is {max(media, key=media.count)}, not an image")


# --- the whole ----------------------------------------------------------------------------------


def map_model(said: Any) -> Schema:
    """Answer the columns of a catalogue row that the provider's description determines.

    Raises Unmappable, with the reason.
    """
    model = read_model(said)
    properties = read_properties(model)
    prompt = find_prompt(properties)
    count, count_rules = find_count(properties)
    return {
        "id": model.id,
        "provider": model.provider,
        "provider_ref": model.ref,
        "prompt_input": prompt,
        "image_count_input": count,
        "max_images": most_images(count_rules),
        "outputs_path": find_outputs(model, properties, count, count_rules),
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
