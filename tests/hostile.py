"""What hostile callers know and send: a victim's rows, and values for every argument there is.

Functions and the types of their arguments come from the catalogue, so a new function is attacked
as soon as it exists. An argument's name says what a plausible value is; its type, what a bad one.
"""

from __future__ import annotations

import io
import json
import os
import struct
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors import PREVIEW, Caller, Service, User, Worker, outcome
from database import Database
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

SECRET = "zebra-4711"  # in each text of the victim's
DETAIL = "zebra-4712"  # what the provider said: for operators only
NOBODY = str(uuid.UUID(int=7))
API_ROLES = ("anon", "authenticated", "service_role")


def attacks(examples: int) -> Callable[..., Any]:
    """Let hypothesis try as many examples, always the same; HOSTILE=20 tries 20 times as many."""
    return settings(
        max_examples=examples * int(os.environ.get("HOSTILE", "1")),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Function:
    """A function as its callers see it."""

    schema: str
    name: str
    arguments: dict[str, str]  # name -> type
    required: int

    def called_by(self, caller: Caller, values: Mapping[str, Any]) -> Any:
        """Return the answer, or how the call is refused."""
        literals = {name: literal(type, values[name]) for name, type in self.arguments.items()}
        return outcome(lambda: caller.call(f"{self.schema}.{self.name}", **literals))


def literal(type: str, value: Any) -> str | None:
    """Write a value as PostgreSQL reads it."""
    if value is None or (isinstance(value, str) and type != "jsonb"):
        return value
    if type.endswith("[]") and isinstance(value, list):
        texts = (each if isinstance(each, str) else json.dumps(each) for each in value)
        quoted = [text if text == "null" else json.dumps(text) for text in texts]
        return f"{{{','.join(quoted)}}}"
    return json.dumps(value)


def functions(db: Database, role: str, *schemas: str) -> list[Function]:
    """Return what a role may call in these schemas."""
    rows = db.execute(
        "select pronamespace::regnamespace::text as schema, proname,"
        " pronargs - pronargdefaults as required,"
        " (select json_object_agg(proargnames[place], format_type(type, null) order by place)"
        "  from unnest(proargtypes) with ordinality as t (type, place)) as arguments"
        " from pg_proc where pronamespace = any(%s::regnamespace[])"
        " and has_function_privilege(%s, oid, 'execute') order by 1, 2",
        list(schemas),
        role,
    )
    return [
        Function(row["schema"], row["proname"], row["arguments"] or {}, row["required"])
        for row in rows
    ]


class Victim:
    """A user with something of everything, each text with the secret in it."""

    def __init__(self, db: Database) -> None:
        db.lift_limits()
        user, service, worker = User(db).has(1000), Service(db), Worker(db)
        self.id, self.worker_id = user.id, worker.id
        self.done = user.enqueued(f"{SECRET} done", idempotency_key=SECRET)
        worker.complete_job(worker.claimed())
        user.share_image(self.done)
        user.set_tags(self.done, "sea", SECRET)
        self.failed = user.enqueued(f"{SECRET} failed")
        worker.fail_job(worker.claimed(), "moderated", DETAIL)
        self.running = user.enqueued(f"{SECRET} running")
        self.token = worker.claimed().token
        self.batch = user.enqueue_batch([f"{SECRET} one", f"{SECRET} two"])["batch_id"]
        self.template = user.save_prompt_template(SECRET, SECRET)["id"]
        self.webhook = service.register_webhook("https://api.example.com/a")["webhook_id"]
        user.register_push_token(f"ExponentPushToken[{SECRET}]")
        self.jobs = [self.done, self.failed, self.running]
        # All that a stranger would like to have guessed.
        self.ids = [*self.jobs, self.batch, self.template, self.webhook, self.id]

    def plausible(self) -> dict[str, list[Any]]:
        """Return values for the arguments of the API, by name (without a private function's p_)."""
        some: dict[str, list[Any]] = {key: [10] for key in ("at_most", "page_size")}
        some |= {key: [0] for key in ("image_position", "position")}
        some |= {key: [True, False] for key in ("is_favorite", "is_liked", "is_public")}
        some |= {key: [False] for key in ("only_favorites", "shows_prompt")}
        return some | {
            "after": [None],
            "amount": [1, -1],
            "batch_id": [self.batch],
            "before": [None, self.done],
            "bucket_seconds": [86400],
            "code": ["moderated", "internal"],
            "delivery_id": [NOBODY],
            "description": ["mine"],
            "events": [None, ["generation.completed"]],
            "expires_at": [None, "2999-01-01"],
            "external_id": [str(uuid.uuid4())],  # used once
            "id": [None, self.template],
            "idempotency_key": [None, "key"],
            "job_id": self.jobs,
            "job_ids": [[], self.jobs],
            "kind": ["grant", "adjust"],
            "max_price_credits": [None, 9],
            "model": [PREVIEW],
            "path": [f"{self.id}/{self.done}/0.png"],
            "paid_until": ["infinity", None],
            "params": [{}, {"width": 64}, {"seed": 1, "reuse": True}],
            "priority": [0],
            "prompt": ["a lighthouse"],
            "prompts": [["a lighthouse"], ["one", "two"]],
            "reason": [None, "too slow"],
            "since": ["2026-01-01"],
            "queue_history.since": ["yesterday"],
            "state": [None, "dead"],
            "status": [None, "completed"],
            "tag": [None, "sea"],
            "tags": [["sea"]],
            "title": ["Sea"],
            "token": ["ExponentPushToken[abcdefghijklmnopqrstuv]"],
            "until": ["2030-01-01"],
            "url": ["https://api.example.com/b"],
            "user_id": [self.id],
            "webhook_id": [self.webhook],
            "window": ["1 hour"],
        }

    def plausible_to_the_worker(self, name: str, type: str) -> Any:
        """Return a value for an argument of the worker's functions, by name without p_, or type."""
        path = f"{self.id}/{self.running}/0.png"
        image = {"position": 0, "storage_path": path, "content_type": "image/png", "bytes": 1000}
        by_name = {
            "codes": ["internal"],
            "images": [[image]],
            "job_id": self.running,
            "job_ids": [self.running],
            "lane": "expo",
            "outcome": "delivered",
            "paths": [path],
            "provider": "replicate",
            "stages": ["storing"],
            "token": self.token,
            "tokens": [self.token],
            "user_id": None,
            "worker_id": self.worker_id,
        }
        metrics = {"provider_seconds": 1}
        one = {"text": "one", "uuid": NOBODY, "boolean": True, "jsonb": metrics, "bytea": None}
        default = one.get(type.removesuffix("[]"), 1)
        return by_name.get(name, [default] if type.endswith("[]") else default)


# Values of the right type that no function should do anything strange with.

DEEP = '{"a":' * 400 + "1" + "}" * 400
TEXTS = [
    *("", " ", "%", "_", "\\", "null", "infinity", "queued", "a,b", "../..", "%s %I %L %% %"),
    *("' or 1=1 --", "'; drop table public.generations; --", "\\'; select pg_sleep(9) --"),
    *("$$; select 1; $$", "E'\\x27'", "') returning *; --", "{{7*7}}", "<script>1</script>"),
    *("x\u202egnp.exe", "\ufeff", "\u2028", "a\nb\r\t", "\x7f\x1b[2J", "e\u0301" * 600),
    *("x" * 300, "x" * 1_000_000, "\U0001f600" * 3000, "x" * 63 + "\u00e9"),
    *("https://", "https://[::1", "https://[::1]/", "https://1/", "https://0x7f.1/"),
    *("https://169.254.169.254/", "https://a@b.example/", "https://a.example:99999/"),
    *("https://" + "a." * 200 + "com", "https://example.com/" + "a" * 5000, "https://xn--/"),
    *("ExponentPushToken[]", "ExponentPushToken[" + "a" * 5000 + "]"),
]
JSON = [
    *([], "", "x", 1, 1.5, True, "{}", "[]", "null", '"{}"', '"x"', {"": 1}, {"nope": {}}),
    *({"seed": value} for value in (1e308, 2**31, 2**63, 10**300, 1.5, "1", None, [], -1)),
    *({"width": value} for value in (-0.0, 1e-300, "64", "x" * 1_000_000, {"$gt": 0}, [64])),
    *({"reuse": 1}, {"num_outputs": 1e10}, {"prompt": "x"}, {"image": "../x"}, {"image": ["a"]}),
    *({"__proto__": 1}, {"constructor": {"prototype": {}}}, json.loads(DEEP), [[]] * 5000),
    # Texts that some gateways hand in place of what they hold.
    *(DEEP * 9, "[" * 100_000, '{"width": 1e999999}', '{"a": "\\u0000"}', '{"a": "\\ud800"}'),
]
HOSTILE: dict[str, list[Any]] = {
    "boolean": [],
    "integer": [0, 1, -1, 2**31 - 1, -(2**31), 100, 101, 1001],
    "jsonb": JSON,
    "text": TEXTS,
    "text[]": [
        *([], [""], [None], ["a", "a"], ["x"] * 21, ["x"] * 1001, ["a\nb", "%s"]),
        *("{{a,b},{c,d}}", "{{{a}}}", "[5:6]={x,y}", ["' or 1=1 --", "\\", '"', "{}", ","]),
    ],
    "timestamp with time zone": [
        *("infinity", "-infinity", "epoch", "294276-12-31", "4714-11-24 BC", "0001-01-01", "now"),
    ],
    "uuid": [str(uuid.UUID(int=0)), str(uuid.UUID(int=2**128 - 1)), NOBODY],
    "uuid[]": [
        *([], [None], [NOBODY] * 101, [NOBODY] * 20_000),
        *(f"{{{{{NOBODY}}}}}", f"{{{{{NOBODY}}},{{{NOBODY}}}}}", f"[5:5]={{{NOBODY}}}"),
    ],
}
# What weighs little and may come to much: written out, counted, matched or walked through.
NUMBERS = [
    f"[{','.join([number] * 4000)}]" for number in ("1e131071", "-1e99999", "1e-16383", "0e-16383")
]
HEAVY = {
    "jsonb": [
        *(text for each in NUMBERS for text in (each, f'{{"a": {each}}}', json.dumps(each))),
        *("1e131071", '{"seed": 1e131071}', json.dumps('{"seed": 1e-16383}')),
        *(f'{{"a": {each[: 9 * count]}1]}}' for each in NUMBERS for count in (25, 800)),
        json.dumps(dict.fromkeys(map(str, range(2000)), 0)).replace(" 0", " 1e131071"),
        *('{"a":' * 9000 + "1e131071" + "}" * 9000, "[" * 10_000 + "]" * 10_000),
        *(json.dumps(deep) for deep in ("[" * 8000 + "]" * 8000, '{"a":' * 2500)),
        *(json.dumps([None] * 50_000), json.dumps({"k" * 250_000: 1})),
        *("{" + '"a": 1,' * 30_000 + '"a": 1}', json.dumps("\x01" * 40_000)),
    ],
    "text": [
        *(text * 250_000 for text in ("x", " ", "\u200b", "e\u0301", "0:", "{a", "a.", "\x01")),
        *("https://" + "a." * 120_000, "ExponentPushToken[" + "a" * 250_000),
    ],
    "text[]": [f"{{{','.join(['a'] * 100_000)}}}", f"{{{'x' * 250_000}}}", f"{{{' ' * 250_000}}}"],
    "uuid[]": [f"{{{','.join([NOBODY] * 10_000)}}}"],
}
# Over HTTP an argument may also be of another type.
MISFITS = [0, 1.5, 10**400, -(2**63), True, [], {}, [1], {"a": [1]}, "nope", "a\0b", "\ud800"]


def one_by_one(function: Function, victim: Victim) -> Iterator[dict[str, Any]]:
    """Return every hostile value of every argument, among others that are plausible."""
    for name, type in function.arguments.items():
        for value in [*HOSTILE[type], None]:
            plausible = victim.plausible()
            yield {each: plausible[each][0] for each in function.arguments} | {name: value}


def arguments(
    function: Function, victim: Victim, misfits: list[Any] | None = None
) -> st.SearchStrategy[dict[str, Any]]:
    """Return values for all arguments: most of them plausible, so that some get far."""
    plausible = victim.plausible()

    def values(name: str, type: str) -> st.SearchStrategy[Any]:
        guesses = victim.ids if type in {"uuid", "text"} else []
        hostile = [*HOSTILE[type], None, *guesses, *(misfits or [])]
        good = st.sampled_from(plausible[name])
        return good | good | st.sampled_from(hostile)

    return st.fixed_dictionaries(
        {name: values(name, type) for name, type in function.arguments.items()}
    )


# Pictures.


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def dear_jpeg(side: int = 3000, size: int = 1_000_000) -> bytes:
    """A valid progressive JPEG that refines nothing, thousands of times: a minute of a core."""
    whole = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * ((size - len(whole)) // len(scan)) + whole[-2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG's."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[2:]
