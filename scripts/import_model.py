"""Enter a Replicate model into the catalogue, or renew it: show each change, then make it.

The model comes from a file of the shape of GET /models/{owner}/{name}, or from the provider itself
(REPLICATE_API_TOKEN, REPLICATE_API_URL). It goes to DATABASE_URL, or else to the local stack.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
from psycopg.types.json import Jsonb

from stack import Stack

API_URL = "https://api.replicate.com/v1"
IMPORT = "select * from private.import_model(%s, %s, p_dry_run => %s)"


def read_model(name: str | None, file: Path | None) -> Any:
    """Return the provider's description of the model; refuse a file that holds another one."""
    if file is None:
        if not name:
            raise ValueError("say which model: MODEL=owner/name, FILE=model.json, or both")
        token = os.environ.get("REPLICATE_API_TOKEN")
        if not token:
            raise ValueError("REPLICATE_API_TOKEN is not set; or give FILE=model.json")
        url = f"{os.environ.get('REPLICATE_API_URL', API_URL).rstrip('/')}/models/{name}"
        answer = httpx.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=30)
        return answer.raise_for_status().json()
    model = parse(file.read_text(), str(file))
    found = f"{model.get('owner')}/{model.get('name')}" if isinstance(model, dict) else "no model"
    if name and name.lower() != found.lower():
        raise ValueError(f"{file} holds {found}, not {name}")
    return model


def parse(text: str, source: str) -> Any:
    """Return what a JSON text says."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} is no JSON: {error}") from None


def read_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the operator decides, as import_model takes it."""
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
    parser.add_argument("model", nargs="?", help="owner/name")
    parser.add_argument("--file", type=Path, help="the model as JSON")
    parser.add_argument("--credits", type=int, help="price of an image; activates a new model")
    parser.add_argument("--paid-credits", type=int, help="the same for paid users")
    parser.add_argument("--allow", help="operator inputs to open to clients, with commas")
    parser.add_argument("--set", help='any column, as JSON: {"deadline": "10 minutes"}')
    parser.add_argument("--dry-run", action="store_true", help="show only")
    arguments = parser.parse_args()
    try:
        model, options = read_model(arguments.model, arguments.file), read_options(arguments)
        stack = Stack.local()
        with psycopg.connect(os.environ.get("DATABASE_URL") or stack.database_url) as database:
            rows = database.execute(IMPORT, [Jsonb(model), Jsonb(options), True]).fetchall()
            lines = [line for row in rows for line in changes(*row)]
            print("\n".join(lines) or "  nothing changes")
            if not arguments.dry_run:
                database.execute(IMPORT, [Jsonb(model), Jsonb(options), False])
    except psycopg.errors.DatabaseError as error:
        detail = error.diag.message_detail if error.diag.sqlstate == "PT400" else None
        sys.exit(f"import-model: {detail or error.diag.message_primary or error}")
    except (ValueError, OSError, httpx.HTTPError) as error:
        sys.exit(f"import-model: {error}")


if __name__ == "__main__":
    main()
