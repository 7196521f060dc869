"""Enter a model of Replicate or fal into the catalogue, or renew it: show each change, make it.

The model comes from a file of the shape that the provider's API answers, or from the provider
itself (REPLICATE_API_TOKEN, REPLICATE_API_URL; FAL_KEY, FAL_API_URL). It goes to DATABASE_URL, or
else to the local stack.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import psycopg
from psycopg.types.json import Jsonb

from model_mapper import Unmappable, map_model, most_images, read_model
from stack import Stack
from worker import libpq_url

# Its key, its API, what stands before the key in the header, and where a model is.
PROVIDERS = {
    "replicate": (
        *("REPLICATE_API_TOKEN", "REPLICATE_API_URL", "https://api.replicate.com/v1"),
        *("Bearer", "models/{}"),
    ),
    "fal": (
        *("FAL_KEY", "FAL_API_URL", "https://api.fal.ai/v1"),
        *("Key", "models?endpoint_id={}&expand=openapi-3.0"),
    ),
}
OPTIONS = [
    "price_credits", "paid_price_credits", "requires_paid", "is_active", "title",
    "provider_ref", "deadline", "cost_usd", "cost_unit", "max_images", "client_inputs",
    "image_inputs", "prompt_input", "image_count_input", "operator_input", "allow_inputs",
    "outputs_path",
]  # fmt: skip
OLD = "select to_jsonb(m) from public.models as m where id = %s for update"
NEW = "select to_jsonb(jsonb_populate_record(null::public.models, %s))"
DELETE = "delete from public.models where id = %s"
INSERT = "insert into public.models select * from jsonb_populate_record(null::public.models, %s)"


def import_model(
    database: psycopg.Connection[Any], model: Any, options: dict[str, Any], *, dry_run: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Enter or renew a model; answer each column that changes, before and after.

    What an operator has decided (prices, title, deadline, whether it is active, which known inputs
    are the clients') outlives every later import. Raises ValueError with the reason; nothing is
    written then.
    """
    if unknown := sorted(options.keys() - OPTIONS):
        raise ValueError(f"options.{unknown[0]}: not an option. Known: {', '.join(OPTIONS)}")
    try:
        mapped = map_model(model)
        with database.transaction():
            row = database.execute(OLD, [mapped["id"]]).fetchone()
            old: dict[str, Any] = row[0] if row else {}
            if old and (ours := name_of(mapped)) != (theirs := name_of(old)):
                raise ValueError(f"{mapped['id']} is there already: {theirs}, not {ours}")
            merged = Jsonb(check(merge(old, mapped, options)))
            (new,) = database.execute(NEW, [merged]).fetchone() or ({},)
            if new != old and not dry_run:
                database.execute(DELETE, [mapped["id"]])
                database.execute(INSERT, [merged])
    except Unmappable as error:
        raise ValueError(f"model: {error}") from None
    return {
        name: (old.get(name), value)
        for name, value in sorted(new.items())
        if old.get(name) != value
    }


def name_of(row: dict[str, Any]) -> str:
    """Tell whose model a row is, whatever the version."""
    return f"{row['provider']}'s {row['provider_ref'].partition(':')[0]}"


def merge(old: dict[str, Any], mapped: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Lay what was there under what the provider says, under what the operator says."""
    known = old.get("input_schema", {}).get("properties", {})
    fixed = options.get("operator_input", {})
    clients = {
        name
        for name in mapped["input_schema"]["properties"]
        if (
            name in old["client_inputs"]
            if name in known
            else name in mapped["client_inputs"] and name not in fixed
        )
    } | set(options.get("allow_inputs", []))
    clients.discard(mapped["prompt_input"])
    count = mapped["image_count_input"] if mapped["image_count_input"] in clients else None
    old_count = old.get("image_count_input")
    if not count:  # clients cannot say how many: more than one is what an operator wanted
        max_images = 1 if old_count else old.get("max_images", 1)
    elif old_count and old["max_images"] < most_images(known[old_count]):
        max_images = min(old["max_images"], mapped["max_images"])  # and so is fewer than can be
    else:
        max_images = mapped["max_images"]
    first = {
        "title": mapped["id"].partition("/")[2].translate(str.maketrans("-_", "  ")).title(),
        "price_credits": 1,
        "paid_price_credits": options.get("price_credits", 1),
        "is_active": "price_credits" in options,  # without a price nobody has decided to sell it
        "requires_paid": False,
        "deadline": "5 minutes",
        "operator_input": {},
    }
    decided = {name: value for name, value in options.items() if name != "allow_inputs"}
    return (
        (old or first)
        | mapped
        | {
            "is_schema_confirmed": True,
            "client_inputs": sorted(clients),
            "image_inputs": [name for name in mapped["image_inputs"] if name in clients],
            "image_count_input": count,
            "max_images": max_images,
            "outputs_path": mapped["outputs_path"] or old.get("outputs_path"),
        }
        | decided
    )


def check(row: dict[str, Any]) -> dict[str, Any]:
    """Answer the row if it can work: what is required can come from somewhere, and what is named
    is there. Raises Unmappable.
    """
    properties = row["input_schema"]["properties"]
    given = {row["prompt_input"], *row["client_inputs"], *row["operator_input"]}
    for name in sorted(set(row["input_schema"]["required"]) - given):
        if "default" not in properties.get(name, {}):
            raise Unmappable(
                f"input {name} is required, but not for clients: give it in operator_input or"
                " allow it"
            )
    for name in sorted(set(row["client_inputs"]) - properties.keys()):
        raise Unmappable(f"it has no input {name}")
    return row


def read_description(provider: str, name: str | None, file: Path | None) -> Any:
    """Return the provider's description of the model; refuse a file that holds another one."""
    if file is None:
        if not name:
            raise ValueError("say which model: MODEL=owner/name, FILE=model.json, or both")
        secret, variable, api, scheme, path = PROVIDERS[provider]
        key = os.environ.get(secret)
        if not key:
            raise ValueError(f"{secret} is not set; or give FILE=model.json")
        url = f"{os.environ.get(variable, api).rstrip('/')}/{path.format(quote(name))}"
        answer = httpx.get(url, headers={"Authorization": f"{scheme} {key}"}, timeout=30)
        return answer.raise_for_status().json()
    said = parse(file.read_text(), str(file))
    model = read_model(said)
    if name and name.lower() not in (model.id, model.ref.lower()):
        raise ValueError(f"{file} holds {model.id}, not {name}")
    return said


def parse(text: str, source: str) -> Any:
    """Return what a JSON text says."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is no JSON: {error}") from None


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the operator decides."""
    options: dict[str, Any] = parse(arguments.set or "{}", "--set")
    named = {"price_credits": arguments.credits, "paid_price_credits": arguments.paid_credits}
    options |= {name: value for name, value in named.items() if value is not None}
    if arguments.allow:
        options["allow_inputs"] = arguments.allow.split(",")
    return options


def changes(field: str, old: Any, new: Any) -> Iterator[str]:
    """Yield one line for each value that differs, however deep."""
    if isinstance(new, dict) and isinstance(old, dict | None):
        for key in sorted({*new, *(old or {})}):
            yield from changes(f"{field}.{key}", (old or {}).get(key), new.get(key))
    elif isinstance(new, list) and isinstance(old, list):
        signs = [f"+{each}" for each in new if each not in old]
        signs += [f"-{each}" for each in old if each not in new]
        yield f"  {field}: {' '.join(signs) or 'in another order'}"
    elif old != new:
        before, after = ("-" if value is None else json.dumps(value) for value in (old, new))
        yield f"  {field}: {before} -> {after}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="what the provider calls it: owner/name")
    parser.add_argument("--provider", choices=PROVIDERS, default="replicate", help="whom to ask")
    parser.add_argument("--file", type=Path, help="the model as JSON")
    parser.add_argument("--credits", type=int, help="price of an image; activates a new model")
    parser.add_argument("--paid-credits", type=int, help="the same for paid users")
    parser.add_argument("--allow", help="operator inputs to open to clients, with commas")
    parser.add_argument("--set", help='any column, as JSON: {"deadline": "10 minutes"}')
    parser.add_argument("--dry-run", action="store_true", help="show only")
    arguments = parser.parse_args()
    try:
        model = read_description(arguments.provider, arguments.model, arguments.file)
        options = read_options(arguments)
        stack = Stack.local()
        url = libpq_url(os.environ.get("DATABASE_URL") or stack.database_url)
        with psycopg.connect(url) as database:
            found = import_model(database, model, options, dry_run=arguments.dry_run)
            lines = [
                line for field, (old, new) in found.items() for line in changes(field, old, new)
            ]
            print("\n".join(lines) or "  nothing changes")
    except psycopg.errors.DatabaseError as error:
        sys.exit(f"import-model: {error.diag.message_primary or error}")
    except (ValueError, OSError, httpx.HTTPError) as error:
        sys.exit(f"import-model: {error}")


if __name__ == "__main__":
    main()
