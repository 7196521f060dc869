"""Descriptions of models as Replicate gives them: made up, and the recorded ones if they are there.

`REPLICATE_SPECS` names a folder of recorded ones (or one with a folder `models`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import import_model as importer

URI = {"type": "string", "format": "uri"}
TEXT = {"type": "string"}
REF = "#/components/schemas/"


def replicate_model(
    inputs: dict[str, Any],
    output: Any = URI,
    required: Any = (),
    schemas: dict[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Return a model with these inputs."""
    parts = {
        "Input": {"type": "object", "properties": inputs, "required": list(required)},
        "Output": output,
    }
    document = {"components": {"schemas": parts | (schemas or {})}}
    version = {"id": "0" * 64, "openapi_schema": document}
    return {"owner": "somebody", "name": "a-model", "latest_version": version} | rest


def fal_model(
    endpoint: str,
    inputs: dict[str, Any],
    outputs: dict[str, str] | None = None,
    required: Any = (),
    category: str = "text-to-image",
) -> dict[str, Any]:
    """Return a model as fal describes it. Outputs name the schema of each, File: an address."""
    reference = {"content": {"application/json": {"schema": {"$ref": REF + "XInput"}}}}
    answer = {"content": {"application/json": {"schema": {"$ref": REF + "XOutput"}}}}
    shown = {name: {"$ref": REF + kind} for name, kind in (outputs or {"images": "Files"}).items()}
    schemas = {
        "XInput": {"type": "object", "properties": inputs, "required": list(required)},
        "XOutput": {"type": "object", "properties": shown},
        "File": {"type": "object", "properties": {"url": TEXT, "content_type": TEXT}},
        "Files": {"type": "array", "items": {"$ref": REF + "File"}},
        "Seed": {"type": "integer"},
        "ImageSize": {"type": "object", "properties": {"width": {}, "height": {}}},
    }
    document = {
        "openapi": "3.0.4",
        "info": {"x-fal-metadata": {"endpointId": endpoint, "category": category}},
        "components": {"schemas": schemas},
        "paths": {
            f"/{endpoint}": {"post": {"requestBody": reference}},
            f"/{endpoint}/requests/{{request_id}}": {"get": {"responses": {"200": answer}}},
        },
    }
    return {"endpoint_id": endpoint, "metadata": {"category": category}, "openapi": document}


def recorded_models() -> list[dict[str, Any]]:
    """Return the recorded models; none if REPLICATE_SPECS is not set."""
    folder = os.environ.get("REPLICATE_SPECS")
    files = sorted(Path(folder).glob("**/models/*.json")) if folder else []
    return [json.loads(file.read_text()) for file in files]


def model_id(model: dict[str, Any]) -> str:
    """Return the id that a model has in the catalogue."""
    return f"{model['owner']}/{model['name']}".lower()


def import_model(db, model, dry_run=False, **options) -> dict[str, tuple[Any, Any]]:
    """Import a model; return before and after of each column that changes."""
    return importer.import_model(db.connect(), model, options, dry_run=dry_run)
