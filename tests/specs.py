"""The providers' own descriptions of their APIs, where they are at hand, to hold the fakes to.

They are not part of this repository.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator


def folder(variable: str) -> Path:
    """Return what a variable of the environment names, or a folder that does not exist."""
    return Path(os.environ.get(variable, "/nonexistent"))


def strict(schema: Any) -> Any:
    """A provider's schema as JSON Schema means it.

    Theirs mark nulls in the manner of OpenAPI 3.0, and a `oneOf` of any string and "hidden"
    refuses "hidden", which matches both.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if "oneOf" in schema:
        schema["anyOf"] = schema.pop("oneOf")
    return {"anyOf": [schema, {"type": "null"}]} if schema.get("nullable") is True else schema


def validator(spec: Path, *path: str, closed: str = "") -> Draft202012Validator:
    """Hold to one part of a file, and to one of its schemas without anything more."""
    document = strict(json.loads(spec.read_text()))
    if closed:
        document["components"]["schemas"][closed]["additionalProperties"] = False
    steps = (step.replace("~", "~0").replace("/", "~1") for step in path)
    return Draft202012Validator(document | {"$ref": f"#/{'/'.join(steps)}"})


def shape(value: Any) -> Any:
    """A value with its types instead of its contents; an integer may stand for a float."""
    if isinstance(value, dict):
        return {key: shape(part) for key, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value]
    return "number" if isinstance(value, int | float) else type(value).__name__
