"""docs/api.md: it has what the catalogue has, and every example answers what it says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from database import PROJECT, Database
from documents import Block, Reader, blocks_of, check_types, prepare, shows
from worker_process import eventually

from stack import Stack

PAGE = PROJECT / "docs" / "api.md"
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"(?ms)^##+ (.+?)$\n(.*?)(?=^###? |\Z)", TEXT))
BLOCKS = {title: blocks_of(text) for title, text in SECTIONS.items()}
FUNCTIONS = {name: text for name, text in SECTIONS.items() if re.fullmatch(r"[a-z_]+", name)}
# Functions by the group they stand in, and who may call those.
GROUPS = {
    title: re.findall(r"(?m)^### ([a-z_]+)$", text)
    for title, text in re.findall(r"(?ms)^## (.+?)$\n(.*?)(?=^## |\Z)", TEXT)
}
OF_THE_BACKEND = ("Credits and users", "Operators", "Webhooks")
ARGUMENTS = re.compile(r"(?ms)^- ((?:`\w+\??`(?:, )?)+): (.*?)(?=^- |^$)")
CALLABLE = """
    select p.proname as name, p.proargnames as arguments,
      p.pronargs - p.pronargdefaults as required, obj_description(p.oid, 'pg_proc') as comment,
      array(
        select split_part(pg_get_function_arg_default(p.oid, n), '::', 1)
        from generate_series(1, p.pronargs) as n
      ) as defaults,
      array(
        select r.name
        from unnest('{anon,authenticated,service_role,darkroom_monitor}'::text[]) as r (name)
        where has_function_privilege(r.name, p.oid, 'execute')
      ) as roles
    from pg_proc as p
    where p.pronamespace = 'public'::regnamespace and p.prokind = 'f'
      and p.prorettype = 'json'::regtype
    order by p.proname
"""


@pytest.fixture(scope="module")
def functions(request):
    """What the API's roles may execute in schema public."""
    server, template = (request.getfixturevalue(name) for name in ("server", "template"))
    database = server.create(template)
    yield {row["name"]: row for row in database.execute(CALLABLE) if row["roles"]}
    server.drop(database)


def test_every_function_is_on_the_page_and_no_other(functions):
    assert sorted(FUNCTIONS) == sorted(functions)


def test_a_group_is_of_who_may_call_it(functions):
    for title, names in GROUPS.items():
        for name in names:
            roles = functions[name]["roles"]
            assert ("authenticated" in roles) == (title not in OF_THE_BACKEND), name
            assert "service_role" in roles or title not in OF_THE_BACKEND, name
    monitors = {name for name, row in functions.items() if "darkroom_monitor" in row["roles"]}
    assert monitors == set(GROUPS["Operators"][-4:])


def test_the_readme_has_the_same_nine_calls():
    _, _, rest = (PROJECT / "README.md").read_text().partition("## The nine calls an app needs\n")
    (nine,) = (names for title, names in GROUPS.items() if "nine" in title)
    assert re.findall(r"(?m)^\| `([a-z_]+)\(", rest.partition("\n## ")[0]) == nine
    assert len(nine) == 9


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_these_arguments_with_these_defaults(functions, name):
    row = functions[name]
    said: dict[str, str] = {}
    for names, rest in ARGUMENTS.findall(text_of(name)):
        said |= dict.fromkeys(re.findall(r"`(\w+\??)`", names), " ".join(rest.split()))
    arguments = row["arguments"] or []
    assert {each.rstrip("?") for each in said} == set(arguments)
    optional = set(arguments[row["required"] :])
    assert {each[:-1] for each in said if each.endswith("?")} == optional
    for argument, default in zip(arguments, row["defaults"], strict=True):
        if default not in (None, "NULL", "'{}'", "''") and "as in [" not in said[f"{argument}?"]:
            assert f"default `{default.strip(chr(39))}`" in said[f"{argument}?"], argument


def text_of(name: str) -> str:
    """Return what is said of a function, without its blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", FUNCTIONS[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_the_errors_that_its_comment_names(functions, name):
    said = re.search(r"(?ms)^Errors: (.*?)\.$", text_of(name))
    assert said, "no line of errors"
    _, _, known = functions[name]["comment"].partition("Errors: ")
    assert tokens(said[1]) == tokens(known)


def tokens(words: str) -> set[str]:
    """Return the tokens that are named, and enqueue_generation for those of that."""
    return {word for word in re.findall(r"[a-z_]+", words) if word in TOKENS} | set(
        re.findall("those of `?(enqueue_generation)", words)
    )


TOKENS = {
    token: int(status)
    for status, token in re.findall(
        r"(?m)^--   PT(\d+) (\w+)", (PROJECT / "sql/00_setup.sql").read_text()
    )
}


def test_every_token_is_in_the_table_of_errors_and_no_other():
    rows = re.findall(r"(?m)^\| (\d+) \| `(\w+)` \|", SECTIONS["Errors"])
    assert {token: int(status) for status, token in rows} == TOKENS


def test_every_code_of_a_failed_job_is_there_with_what_is_done_about_it(db: Database):
    rows = re.findall(r"(?m)^\| `(\w+)` \| .+ \| (.+) \|$", SECTIONS["Why a job failed"])
    known = {row["code"]: row for row in db.execute("select * from private.error_codes")}
    assert {code for code, _ in rows} == set(known)
    for code, again in rows:
        row = known[code]
        assert again.startswith("yes" if row["is_retryable"] else "no"), code
        if row["is_retryable"]:
            assert ("without using an attempt" in again) != row["uses_attempt"], code
            assert ("resumes" in again) == row["resumes"], code


def test_every_function_has_one_example_that_calls_it():
    for name in FUNCTIONS:
        (block,) = (block for block in BLOCKS[name] if block.shown)
        assert re.search(rf"rpc\('{name}'|service {name}\b", block.text), name


# The examples, in order.

GIVEN = """\
import { createClient } from '@supabase/supabase-js';
let answered = '';
const supabase = createClient(process.env['API_URL']!, process.env['ANON_KEY']!, {
  accessToken: () => Promise.resolve(process.env['TOKEN']!),
  global: {
    fetch: async (...request) => {
      const answer = await fetch(...request);
      answered = await answer.clone().text();
      return answer;
    },
  },
});
"""
IDS = ("job_id", "batch_id", "webhook_id", "delivery_id", "id")


def module(block: Block) -> str:
    """Return the TypeScript of an example, which prints what its last call was answered."""
    known = [name for name in IDS if re.search(rf"\b{name}\b", block.text)]
    given = "".join(f"const {name} = process.env['{name}']!;\n" for name in known)
    used = ", ".join(["supabase", "answered", *known])
    end = "" if "console.log" in block.text else "console.log(answered);\n"
    return f"{GIVEN}{given}{block.text}{end}void [{used}];\nexport {{}};\n"


class Caller(Reader):
    """Somebody who calls one function after the other, and keeps the ids that are answered."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        super().__init__(stack, folder)
        self.db = Database(stack.database_url, "postgres")

    def ts(self, block: Block) -> str:
        return super().ts(replace(block, text=module(block)))

    def example(self, block: Block) -> None:
        printed = getattr(self, block.language)(block)
        assert shows(printed, block.shown or "…"), f"{block.text}\n{printed}"
        if printed.startswith(("{", "[{")):
            answer = json.loads(printed)
            answer = answer[0] if isinstance(answer, list) else answer
            self.environment |= {name: answer[name] for name in IDS if answer.get(name)}

    # What is so before the first example of a section.

    def before_cancel_generation(self) -> None:
        """A job waits that no worker takes."""
        self.stack.worker.stop()
        given = "const model = 'darkroom/preview', prompt = 'a lighthouse at dusk, oil painting';\n"
        asked = (
            "await supabase.rpc('enqueue_generation', { model, prompt, params: { width: 768 } });"
        )
        self.example(Block("", "", "ts", given + asked, "…"))

    def before_delete_generation(self) -> None:
        self.stack.worker.start(self.stack.worker_environment())
        self.all_ended()

    def before_apply_billing_event(self) -> None:
        product = "insert into public.credit_products (provider, product_id, credits)"
        self.db.execute(f"{product} values ('stripe', 'pack_100', 100)")

    def before_merge_user(self) -> None:
        query = "insert into auth.users (id, is_anonymous) values (gen_random_uuid(), true)"
        [guest] = self.db.execute(f"{query} returning id")
        self.environment["guest_id"] = str(guest["id"])

    def before_queue_health(self) -> None:
        self.all_ended()

    def before_register_webhook(self) -> None:
        """Nothing is sent to what the page has for an address."""
        self.stack.worker.stop()

    def before_list_deliveries(self) -> None:
        self.db.execute(
            "insert into private.deliveries (generation_id, event_type, lane, state, attempts,"
            " last_status, last_error, finished_at)"
            " values (%s, 'generation.completed', %s, 'dead', 10, 500, 'HTTP 500', now())",
            *(self.environment[name] for name in ("job_id", "webhook_id")),
        )

    def before_Retry_After(self) -> None:
        self.db.execute("select public.pause_model('darkroom/preview', now() + interval '1 hour')")

    def all_ended(self) -> None:
        eventually(lambda: self.db.value("select count(*) = 0 from private.live_jobs"), 60)


def test_every_example_answers_what_the_page_says(tmp_path):
    folder = tmp_path / "stack"
    with Stack(folder, fsync=False, with_worker=True).running() as stack:
        (tmp_path / "caller").mkdir()
        caller = Caller(stack, tmp_path / "caller")
        for title in SECTIONS:
            getattr(caller, f"before_{title.replace('-', '_')}", lambda: None)()
            for block in BLOCKS[title]:
                if block.is_run:
                    caller.example(block)
        caller.db.close()


def test_the_examples_are_right_by_their_types(tmp_path):
    prepare(tmp_path)
    for number, block in enumerate(block for blocks in BLOCKS.values() for block in blocks):
        if block.is_run and block.language == "ts":
            (tmp_path / f"example_{number}.ts").write_text(module(block))
    check_types(tmp_path)
