"""Small fakes of fal's queue, Black Forest Labs, OpenAI images and ComfyUI, beside fake_replicate.

    with FakeFal() as fake:  # the provider's row gets fake.base_url, the worker fake.key
        fake.next(answer=429, retry_after=5)  # the first create is refused,
        fake.next(ends="moderated")  # the second is moderated, in the provider's own way,
        fake.next(answer=None, stored=True)  # the third is bought, and its answer lost;
        ...  # all others follow fake.default
        assert len(fake.bought) == 3  # ids, as often as they were bought
        assert not fake.faults  # such as a key that came to fake.cdn, where the pictures are

What is asked for moves when it is polled, so tests need no sleeps. State is public and may be
edited. What the fakes answer is held to the providers' own API files by test_fake_providers.py;
where those say nothing, to the words of their documentation.
"""

import base64
import email
import json
import re
import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlencode

import receiver
from database import Database
from fake_replicate import Fake, Request, as_json, image, moment
from hostile import chunk, with_chunks
from psycopg.types.json import Jsonb
from receiver import Answer, HttpServer

OK = 200


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What happens to one create and to what it buys."""

    # The create.
    answer: int | None = OK  # None hangs up without one
    stored: bool | None = None  # is it bought? None: if the answer is 200 or none at all
    retry_after: int | str | None = None  # told by a 429
    is_mixed_up: bool = False  # the answer is that of an earlier create
    # The run.
    queued: int = 1  # so many polls find it waiting, where the provider has a queue
    polls: int = 2  # and after so many in all it is over
    ends: str = "succeeded"  # moderated, invalid, failed, gone
    error: str | None = None  # in what words
    form: str = ""  # of the output, or of the end, where there are several: see the class
    failing_gets: int = 0  # so many polls are answered with get_status first
    get_status: int | None = 500
    hidden: int = 0  # so many lists do not show it yet
    # The output.
    images: int = 1
    file: str = "image"  # gone, junk
    size: tuple[int, int] = (64, 48)
    # Seconds each answer takes, by kind: create, get, file. The effect comes first.
    slow: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Task:
    """What a create bought."""

    id: str
    model: str
    body: Any
    behaviour: Behaviour
    source: bytes  # what was at the addresses in its input, or in the input itself
    number: int
    sent: datetime = field(default_factory=lambda: datetime.now(UTC))
    over: datetime | None = None
    state: str = "queued"  # running, then what its behaviour says or canceled
    gets: int = 0
    lists: int = 0

    @property
    def is_over(self) -> bool:
        return self.state not in ("queued", "running")

    def advance(self) -> None:
        self.gets += 1
        if not self.is_over and self.gets > self.behaviour.failing_gets:
            done = self.gets - self.behaviour.failing_gets
            self.state = "queued" if done <= self.behaviour.queued else "running"
            if done >= self.behaviour.polls:
                self.end(self.behaviour.ends)

    def end(self, state: str) -> None:
        self.state, self.over = state, datetime.now(UTC)


class Cdn(HttpServer):
    """Where a provider's pictures are: another host than its API, and no key may come here."""

    def __init__(self, owner: "FakeProvider", certificate: Path | None) -> None:
        super().__init__(certificate)
        self.host = f"localhost:{self.port}"  # by another name than the API
        self.origin = f"{self.scheme}://{self.host}"
        self.owner, self.requests = owner, list[receiver.Request]()

    def respond(self, came: receiver.Request) -> Answer:
        self.requests.append(came)
        key = self.owner.key
        if key and key in f"{came.path} {came.headers} {came.body!r}":
            self.owner.faults.append(f"the key came to {came.path}")
        return self.owner.picture(*came.path.strip("/").split("/"))


class FakeProvider(Fake):
    """What all have in common. Each class says how its requests and its answers look."""

    name: ClassVar[str]
    base = ""  # path of base_url
    login = "authorization", "Bearer "
    routes: ClassVar[dict[str, str]]  # pattern of method and path -> name of a method
    account: Any = None  # what a free check of the key answers
    forms: ClassVar[tuple[str, ...]] = ("",)  # of a success
    at_create: ClassVar[set[str]] = set()  # ends that the answer of a create tells already
    statuses: ClassVar[dict[str, int]] = {"invalid": 422}  # of answers that tell ends

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__()
        self.cdn = Cdn(self, certificate)
        self.base_url = self.origin + self.base
        self.key = f"{self.name}_{secrets.token_hex(16)}"
        self.default = Behaviour()
        self.bought: list[str] = []  # ids, in order
        self.tasks: dict[str, Task] = {}
        self.faults: list[str] = []  # what nobody should have sent
        self.uploads: dict[str, bytes] = {}

    def __enter__(self) -> Self:
        self.cdn.__enter__()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        self.cdn.__exit__(*error)
        super().__exit__(*error)

    def points(self, db: Database, settle: str) -> None:
        """Let a database's provider of this name be this one, of which as much as one likes."""
        db.runs_at(self.name, self.base_url, settle)
        query = (
            "update private.providers set hosts = '{localhost}', max_running = null,"
            " recipe = recipe || jsonb_build_object('places', %s) where name = %s"
        )
        db.execute(query, Jsonb({"api": f"{self.origin}/platform/v1"}), self.name)

    def shows(self, output: str, task: Task) -> bool:
        """Whether an output, as a worker is told of it, is a task's."""
        return task.id in output

    # What each class says for itself.

    def accepted(self, task: Task) -> Any:
        """Say that it was bought."""
        raise NotImplementedError

    def refusal(self, path: str, status: int, words: str, ends: str) -> Any:
        """Say that it is refused."""
        raise NotImplementedError

    def wrong(self, body: Any) -> str:
        """Say what is wrong with the body of a create, if it is."""
        has_prompt = isinstance(body, dict) and isinstance(body.get("prompt"), str)
        return "" if has_prompt else "prompt: field required"

    # What is common.

    def route(self, request: Request) -> Answer:
        header, scheme = self.login
        if self.key and request.headers.get(header) != scheme + self.key:
            return self.refuse(request, 401)
        for pattern, name in self.routes.items():
            if found := re.fullmatch(pattern, f"{request.method} {unquote(request.path)}"):
                answer = getattr(self, name)(request, *found.groups())
                return answer or self.refuse(request, 404)
        return self.refuse(request, 404)

    def refuse(
        self,
        request: Request,
        status: int | None,
        words: str | None = None,
        ends: str = "",
        after: object = None,
    ) -> Answer:
        if status is None:
            return Answer(None)
        told = {} if after is None else {"Retry-After": str(after)}
        words = words or f"Refused: {status}"
        return as_json(status, self.refusal(request.path, status, words, ends), **told)

    def create(self, request: Request, model: str = "") -> Answer:
        self.creates.append(request)
        if wrong := self.wrong(request.body):
            return self.refuse(request, self.statuses["invalid"], wrong, "invalid")
        behaviour = self._next.popleft() if self._next else self.default
        for text, refused in self.refused.items():
            if text in f"{request.path} {json.dumps(request.body)}":
                behaviour = replace(behaviour, answer=refused)
        status, ends = behaviour.answer, ""
        if status == OK and behaviour.ends in self.at_create:
            status, ends = self.statuses[behaviour.ends], behaviour.ends
        task = None
        if status in (OK, None) if behaviour.stored is None else behaviour.stored:
            task = self.buy(model, request.body, behaviour)
            request.prediction_id = task.id
        answer = self.refuse(request, status, behaviour.error, ends, behaviour.retry_after)
        if task and status == OK:
            first = next(iter(self.tasks.values()))
            answer = as_json(OK, self.accepted(first if behaviour.is_mixed_up else task))
        return replace(answer, wait=behaviour.slow.get("create", 0))

    def buy(self, model: str, body: Any, behaviour: Behaviour | None = None) -> Task:
        """Have one, perhaps one that nobody asked for over HTTP."""
        key = (self.key == "" and body.get("prompt_id")) or str(uuid.uuid4())
        source = b"".join(self.files(body))
        task = Task(key, model, body, behaviour or self.default, source, len(self.bought))
        self.tasks[key] = task
        self.bought.append(key)
        return task

    def files(self, value: Any) -> Iterator[bytes]:
        """All files that an input has: in it, at an address, or uploaded."""
        if isinstance(value, dict | list):
            for each in value.values() if isinstance(value, dict) else value:
                yield from self.files(each)
        elif isinstance(value, str) and value.startswith("data:"):
            yield base64.b64decode(value.partition(",")[2])
        elif isinstance(value, str) and value.startswith(("https://", "http://")):
            yield self.fetch(value)
        elif isinstance(value, str) and value in self.uploads:
            yield self.uploads[value]

    def polled(self, request: Request, key: str, tell: Callable[[Task], Any]) -> Answer | None:
        """The answer of a poll: what has become of it since the last one."""
        if not (task := self.tasks.get(key)):
            return None
        self.advance(task)
        behaviour = task.behaviour
        if 0 < task.gets <= behaviour.failing_gets:
            answer = self.refuse(request, behaviour.get_status, after=behaviour.retry_after)
        else:
            answer = tell(task)
        return replace(answer, wait=behaviour.slow.get("get", 0))

    def advance(self, task: Task) -> None:
        task.advance()

    def check(self, request: Request) -> Answer:
        """The answer of the free check of the account."""
        if self.account_status == OK:
            return as_json(OK, self.account)
        return self.refuse(request, self.account_status)

    def urls(self, task: Task) -> list[str]:
        return [f"{self.cdn.origin}/{task.id}/{n}.png" for n in range(task.behaviour.images)]

    def picture(self, key: str = "", name: str = "0.png") -> Answer:
        """A file of a task's."""
        task = self.tasks.get(key)
        if not task or task.behaviour.file == "gone":
            return Answer(404, body=b"Not found")
        body = image("png", task.behaviour.size, int(name.partition(".")[0]), task.source)
        # As some do, it tells what it was made from. It is no smaller than real ones, either.
        body = with_chunks(body, chunk(b"tEXt", b"prompt\0" + f"{task.body!s:999}".encode()))
        if task.behaviour.file == "junk":
            body = b"<!doctype html><script>alert(1)</script>"
        wait = task.behaviour.slow.get("file", 0)
        return Answer(OK, {"Content-Type": "image/png"}, body, wait=wait)


class FakeFal(FakeProvider):
    """Its queue, and what is at api.fal.ai below /platform. What is wrong shows in the result."""

    name, login = "fal", ("authorization", "Key ")
    routes: ClassVar = {
        "GET /platform/v1/account/billing": "check",
        "GET /platform/v1/models/requests/by-endpoint": "_list",
        "GET /[^/]+/[^/]+/requests/([^/]+)/status": "_status",
        "GET /[^/]+/[^/]+/requests/([^/]+)": "_result",
        "PUT /[^/]+/[^/]+/requests/([^/]+)/cancel": "_cancel",
        "POST /([^/]+/.+)": "create",
    }
    account: ClassVar = {
        "username": "darkroom",
        "credits": {"current_balance": 24.5, "currency": "USD"},
    }
    forms = ("images", "image")
    statuses: ClassVar = {"invalid": 422, "moderated": 422, "failed": 500}
    TYPES: ClassVar = {
        "invalid": "value_error",
        "moderated": "content_policy_violation",
        "failed": "runner_server_error",
    }

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(certificate)
        self.platform = f"{self.origin}/platform"  # in place of https://api.fal.ai
        self.status_tells = True  # that one failed; else only its result does
        self.lists_running = True  # whether the list shows what is not over is not known

    def wrong(self, body: Any) -> str:
        return "" if isinstance(body, dict) else "must be an object"

    def refusal(self, path: str, status: int, words: str, ends: str) -> Any:
        if path.startswith("/platform"):
            return {"error": {"type": "authorization_error", "message": words}}
        if ends in ("invalid", "moderated"):
            error = {"loc": ["body", "prompt"], "msg": words, "type": self.TYPES[ends]}
            error["url"] = f"https://docs.fal.ai/errors#{self.TYPES[ends]}"
            about = {"categories": ["sexual"]} if ends == "moderated" else {}
            return {"detail": [error | {"input": "it"} | about]}
        kinds = {500: self.TYPES["failed"], 504: "request_timeout"}
        return {"detail": words} | ({"error_type": kinds[status]} if status in kinds else {})

    def accepted(self, task: Task) -> Any:
        return self._shown(task, "IN_QUEUE") | {"queue_position": 0}

    def _shown(self, task: Task, status: str) -> dict[str, Any]:
        app = "/".join(task.model.split("/")[:2])  # whatever is below
        url = f"{self.origin}/{app}/requests/{task.id}"
        urls = {"response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}
        return {"status": status, "request_id": task.id} | urls

    def _status(self, request: Request, key: str) -> Answer | None:
        def tell(task: Task) -> Answer:
            if task.state == "queued":
                return as_json(202, self._shown(task, "IN_QUEUE") | {"queue_position": 0})
            line = {"message": " 50%|█████     | 2/4 [00:01<00:01,  1.9it/s]", "level": "INFO"}
            logs = {"logs": [line | {"source": "USER", "timestamp": stamp(task.sent)}]}
            if task.state == "running":
                return as_json(202, self._shown(task, "IN_PROGRESS") | logs)
            if task.state == "succeeded":
                told = {"metrics": {"inference_time": 3.21}}
            elif self.status_tells and task.state in self.statuses:
                status, kind = self.statuses[task.state], self.TYPES[task.state]
                words = task.behaviour.error or f"Invalid status code: {status}"
                told = {"metrics": {}, "error": words, "error_type": kind}
            else:
                told = {"metrics": {}}
            return as_json(OK, self._shown(task, "COMPLETED") | logs | told)

        return self.polled(request, key, tell) if self._is_known(key) else None

    def _is_known(self, key: str) -> bool:
        return key in self.tasks and self.tasks[key].state != "gone"

    def _result(self, request: Request, key: str) -> Answer | None:
        if not self._is_known(key):
            return None
        task = self.tasks[key]
        if not task.is_over:
            return self.refuse(request, 400, "Request is still in progress")
        if task.state in self.statuses:
            status, words = self.statuses[task.state], task.behaviour.error
            return self.refuse(request, status, words, task.state)
        return as_json(OK, self._output(task))

    def _output(self, task: Task) -> dict[str, Any]:
        width, height = task.behaviour.size
        kind = {"width": width, "height": height, "content_type": "image/png"}
        pictures = [
            {"url": url, **kind, "file_name": "x.png", "file_size": 99} for url in self.urls(task)
        ]
        output = {"image": pictures[0]} if task.behaviour.form == "image" else {"images": pictures}
        told = {"seed": 7, "has_nsfw_concepts": [False], "timings": {"inference": 3.2}}
        return output | told | {"prompt": str(task.body.get("prompt"))}

    def _cancel(self, _: Request, key: str) -> Answer:
        if not self._is_known(key):
            return as_json(404, {"status": "NOT_FOUND"})
        task = self.tasks[key]
        if task.is_over:
            return as_json(400, {"status": "ALREADY_COMPLETED"})
        if task.state == "running":  # the app decides: this one goes on
            return as_json(202, {"status": "CANCELLATION_REQUESTED"})
        task.end("gone")
        return as_json(OK, {"status": "OK"})

    def _list(self, request: Request) -> Answer:
        """One page of what was sent since a time, the last that ended first."""
        query, shown = request.query, []
        since = moment(query.get("start", "0001-01-01T00:00:00Z"))
        for task in self.tasks.values():
            task.lists += 1
            is_shown = task.lists > task.behaviour.hidden and (task.is_over or self.lists_running)
            if is_shown and task.model == query["endpoint_id"] and task.sent >= since:
                shown.append(task)
        shown.sort(key=lambda task: task.over or datetime.now(UTC), reverse=True)
        size, page = int(query.get("limit", 50)), int(query.get("cursor", 1))
        has_more = len(shown) > page * size
        items = [self._item(task, query) for task in shown[(page - 1) * size : page * size]]
        cursor = str(page + 1) if has_more else None
        return as_json(OK, {"items": items, "next_cursor": cursor, "has_more": has_more})

    def _item(self, task: Task, query: dict[str, str]) -> dict[str, Any]:
        item = {
            "request_id": task.id,
            "endpoint_id": task.model,
            "sent_at": stamp(task.sent),
            "started_at": stamp(task.sent),
            "ended_at": task.over and stamp(task.over),
            "status_code": self.statuses.get(task.state, OK) if task.is_over else None,
        }
        if "payloads" in query.get("expand", ""):
            item |= {"json_input": task.body}
            item |= {"json_output": self._output(task)} if task.state == "succeeded" else {}
        return item


class FakeBfl(FakeProvider):
    """Black Forest Labs. Nothing can be canceled, listed or named."""

    name, base, login = "bfl", "/v1", ("x-key", "")
    routes: ClassVar = {
        "POST /v1/([^/]+)": "create",
        "GET /v1/get_result": "_poll",
        "GET /v1/credits": "check",
    }
    account: ClassVar = {"credits": 24.5}
    at_create: ClassVar = {"invalid"}
    STATES: ClassVar = {"succeeded": "Ready", "failed": "Error", "gone": "Task not found"}
    MODERATED: ClassVar = {"": "Request Moderated", "content": "Content Moderated"}  # by form

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(certificate)
        self.region = self.origin  # where polling_url leads

    def refusal(self, path: str, status: int, words: str, ends: str) -> Any:
        error = {"loc": ["body", "prompt"], "msg": words, "type": "value_error"}
        return {"detail": [error] if status == self.statuses["invalid"] else words}

    def accepted(self, task: Task) -> Any:
        url = f"{self.region}/v1/get_result?{urlencode({'id': task.id})}"
        return {"id": task.id, "polling_url": url, "cost": 4.5, "input_mp": 0, "output_mp": 1.05}

    def _poll(self, request: Request) -> Answer:
        key = request.query.get("id", "")
        gone = {"id": key, "status": "Task not found", "result": None}
        return self.polled(request, key, self._status) or as_json(OK, gone)

    def _status(self, task: Task) -> Answer:
        told: dict[str, Any] = {"result": None, "progress": None, "details": None, "preview": None}
        state = self.STATES.get(task.state, "Pending")
        if state == "Pending":
            told["progress"] = 0.5 if task.state == "running" else 0
        if task.state == "succeeded":
            begun = task.sent.timestamp()
            result = {"start_time": begun, "end_time": begun + 4.8, "duration": 4.8, "seed": 42}
            told["result"] = {"sample": self.urls(task)[0], "prompt": task.body["prompt"]} | result
        if task.state == "failed":
            told["details"] = {"error": task.behaviour.error or "Something went wrong"}
        if task.state == "moderated":
            state = self.MODERATED[task.behaviour.form]
            told["details"] = {"Moderation Reasons": [task.behaviour.error or "Violence"]}
        return as_json(OK, {"id": task.id, "status": state} | told)


class FakeOpenAI(FakeProvider):
    """OpenAI's images: the answer of a create is all there is."""

    name, base = "openai", "/v1"
    routes: ClassVar = {
        "POST /v1/images/(generations|edits)": "create",
        "GET /v1/models": "check",
    }
    account: ClassVar = {"object": "list", "data": []}
    forms = ("b64_json", "url")
    at_create: ClassVar = {"invalid", "moderated", "failed"}
    statuses: ClassVar = {"invalid": 400, "moderated": 400, "failed": 500}
    CODES: ClassVar = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}

    def refusal(self, path: str, status: int, words: str, ends: str) -> Any:
        kind = "server_error" if status >= self.statuses["failed"] else "invalid_request_error"
        error = {"type": kind, "code": self.CODES.get(status), "param": None, "message": words}
        if ends == "moderated":
            error |= {"type": "image_generation_user_error", "code": "moderation_blocked"}
            error["message"] = f"Your request was rejected by the safety system. {words}"
            error["moderation_details"] = {"moderation_stage": "input", "categories": ["sexual"]}
        return {"error": error}

    def accepted(self, task: Task) -> Any:
        task.end("succeeded")
        if task.behaviour.form == "url":
            data = [{"url": url} for url in self.urls(task)]
        else:
            files = (self.picture(task.id, f"{n}.png").body for n in range(task.behaviour.images))
            data = [{"b64_json": base64.b64encode(file).decode()} for file in files]
        usage = {"total_tokens": 100, "input_tokens": 50, "output_tokens": 50}
        usage |= {"input_tokens_details": {"text_tokens": 10, "image_tokens": 40}}
        about = {"background": "opaque", "output_format": "png", "size": "1024x1024"}
        return {
            "created": int(time.time()),
            "data": data,
            "quality": "high",
            "usage": usage,
        } | about


class FakeComfyUI(FakeProvider):
    """ComfyUI: one prompt at a time, no key. What is asked for twice is made twice."""

    name = "comfyui"
    routes: ClassVar = {
        "POST /prompt": "create",
        "GET /history/([^/]+)": "_history",
        "GET /queue": "_queue",
        "POST /queue": "_delete",
        "POST /interrupt": "_interrupt",
        "GET /view": "_view",
        "POST /upload/image": "_upload",
    }
    forms = ("output", "temp", "subfolder")  # temp: with a preview before it
    at_create: ClassVar = {"invalid"}
    statuses: ClassVar = {"invalid": 400}

    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(certificate)
        self.key = ""
        self.made: dict[tuple[str, ...], tuple[str, str]] = {}  # type, folder, name -> picture

    def restart(self) -> None:
        """Lose what it remembers. Files stay."""
        for task in self.tasks.values():
            task.end("gone")

    def wrong(self, body: Any) -> str:
        nodes = body.get("prompt") if isinstance(body, dict) else None
        if not isinstance(nodes, dict) or not nodes:
            return "No prompt provided"
        if not all(isinstance(node, dict) and "class_type" in node for node in nodes.values()):
            return "Cannot execute because a node is missing the class_type property."
        if not any(node["class_type"] == "SaveImage" for node in nodes.values()):
            return "Prompt has no outputs"
        loaded = [n["inputs"]["image"] for n in nodes.values() if n["class_type"] == "LoadImage"]
        missing = [name for name in loaded if name not in self.uploads]
        return f"image - Invalid image file: {missing[0]}" if missing else ""

    def refusal(self, path: str, status: int, words: str, ends: str) -> Any:
        kind, words_of_all = "prompt_outputs_failed_validation", "Prompt outputs failed validation"
        error = {"type": kind, "message": words_of_all, "details": "", "extra_info": {}}
        wrong = {"type": "value_not_in_list", "message": "Value not in list", "details": words}
        node = {"errors": [wrong | {"extra_info": {}}], "dependent_outputs": ["9"]}
        return {"error": error, "node_errors": {"4": node | {"class_type": "KSampler"}}}

    def accepted(self, task: Task) -> Any:
        return {"prompt_id": task.id, "number": task.number, "node_errors": {}}

    def _waiting(self) -> list[Task]:
        """The one that runs, and those behind it."""
        return [task for task in self.tasks.values() if not task.is_over]

    def advance(self, task: Task) -> None:
        """The one that runs advances, whoever asks for which."""
        for each in self._waiting()[:1]:
            each.advance()

    def _history(self, request: Request, key: str) -> Answer:
        def tell(task: Task) -> Answer:
            is_told = task.is_over and task.state != "gone"
            return as_json(OK, {key: self._done(task)} if is_told else {})

        return self.polled(request, key, tell) or as_json(OK, {})

    def _queue(self, _: Request) -> Answer:
        entries = [self._entry(task) for task in self._waiting()]
        return as_json(OK, {"queue_running": entries[:1], "queue_pending": entries[1:]})

    def _entry(self, task: Task) -> list[Any]:
        return [task.number, task.id, task.body["prompt"], {}, ["9"]]

    def _delete(self, request: Request) -> Answer:
        for task in self._waiting()[1:]:
            if task.id in request.body["delete"]:
                task.end("gone")
        return Answer()

    def _interrupt(self, request: Request) -> Answer:
        asked = (request.body or {}).get("prompt_id")
        if asked is None:
            self.faults.append("whatever ran was interrupted")
        for task in self._waiting()[:1]:
            if asked in (None, task.id):
                task.end("canceled")
        return Answer()

    def _done(self, task: Task) -> dict[str, Any]:
        at = {"prompt_id": task.id, "timestamp": 0}
        node = at | {"node_id": "3", "node_type": "KSampler", "executed": []}
        is_done, outputs = task.state == "succeeded", {}
        if is_done:
            end = ["execution_success", at]
            saved = [self._made(task, n, "output") for n in range(task.behaviour.images)]
            outputs = {"9": {"images": saved}}
            if task.behaviour.form == "temp":
                outputs = {"7": {"images": [self._made(task, 99, "temp")]}} | outputs
        elif task.state == "canceled":
            end = ["execution_interrupted", node]
        else:
            words = task.behaviour.error or "CUDA out of memory"
            error = {"exception_message": words, "exception_type": "torch.OutOfMemoryError"}
            error |= {"traceback": [], "current_inputs": {}, "current_outputs": []}
            end = ["execution_error", node | error]
        status = {"status_str": "success" if is_done else "error", "completed": is_done}
        status |= {"messages": [["execution_start", at], end]}
        return {"prompt": self._entry(task), "outputs": outputs, "status": status}

    def _made(self, task: Task, number: int, kind: str) -> dict[str, str]:
        folder = "today & tomorrow/été" if task.behaviour.form == "subfolder" else ""
        name = f"ComfyUI {task.number}_{number:05}_.png"
        self.made[kind, folder, name] = (task.id, f"{number}.png")
        return {"filename": name, "subfolder": folder, "type": kind}

    def shows(self, output: str, task: Task) -> bool:
        return f"ComfyUI%20{task.number}_" in output

    def _view(self, request: Request) -> Answer | None:
        asked = tuple(request.query.get(name, "") for name in ("type", "subfolder", "filename"))
        return self.picture(*self.made[asked]) if asked in self.made else None

    def _upload(self, request: Request) -> Answer:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        parts = email.message_from_bytes(head + request.raw).get_payload()
        fields = {part.get_param("name", header="content-disposition"): part for part in parts}
        content, name = fields["image"].get_payload(decode=True), fields["image"].get_filename()
        if "overwrite" not in fields and self.uploads.get(name, content) != content:
            name = f"{len(self.uploads)} {name}"
        folder = fields["subfolder"].get_payload() if "subfolder" in fields else ""
        self.uploads[f"{folder}/{name}".strip("/")] = content
        return as_json(OK, {"name": name, "subfolder": folder, "type": "input"})


FAKES: dict[str, type[FakeProvider]] = {
    fake.name: fake for fake in (FakeFal, FakeBfl, FakeOpenAI, FakeComfyUI)
}


def stamp(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
