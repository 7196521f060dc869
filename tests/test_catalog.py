"""The house linter: what must hold for every table, function and file, now and later."""

import re
import statistics
from pathlib import Path

import pytest
from database import SQL_FILES

OURS = "('public'::regnamespace, 'private'::regnamespace)"
ROLES = (
    "anon",
    "authenticated",
    "service_role",
    "darkroom_worker",
    "darkroom_monitor",
    "public",
)

# Whoever has not signed in is told so by the function.
FOR_USERS = {
    "public.cancel_batch(uuid)",
    "public.cancel_generation(uuid)",
    "public.delete_generation(uuid)",
    "public.delete_prompt_template(uuid)",
    "public.enqueue_batch(text,text[],jsonb,text)",
    "public.enqueue_generation(text,text,jsonb,text)",
    "public.get_batch_status(uuid)",
    "public.get_entitlement()",
    "public.get_job_status(uuid)",
    "public.like_image(uuid,integer,boolean)",
    "public.list_active_jobs(uuid[])",
    "public.list_generations(uuid,integer,boolean,text,text)",
    "public.list_models()",
    "public.list_prompt_templates()",
    "public.list_public_images(uuid,integer)",
    "public.ping()",
    "public.register_push_token(text)",
    "public.restore_generation(uuid)",
    "public.retry_generation(uuid)",
    "public.save_prompt_template(text,text,text,jsonb,uuid)",
    "public.set_favorite(uuid,boolean)",
    "public.set_tags(uuid,text[])",
    "public.share_image(uuid,integer,boolean,boolean)",
    "public.unregister_push_token(text)",
    "private.cancel_batch(uuid)",
    "private.cancel_generation(uuid)",
    "private.delete_generation(uuid)",
    "private.delete_prompt_template(uuid)",
    "private.enqueue_batch(text,text[],jsonb,text)",
    "private.enqueue_generation(text,text,jsonb,text)",
    "private.get_batch_status(uuid)",
    "private.get_entitlement()",
    "private.get_job_status(uuid)",
    "private.like_image(uuid,integer,boolean)",
    "private.list_active_jobs(uuid[])",
    "private.list_generations(uuid,integer,boolean,text,text)",
    "private.list_models()",
    "private.list_prompt_templates()",
    "private.list_public_images(uuid,integer)",
    "private.register_push_token(text)",
    "private.restore_generation(uuid)",
    "private.retry_generation(uuid)",
    "private.save_prompt_template(text,text,text,jsonb,uuid)",
    "private.set_favorite(uuid,boolean)",
    "private.set_tags(uuid,text[])",
    "private.share_image(uuid,integer,boolean,boolean)",
    "private.unregister_push_token(text)",
}
MAY_EXECUTE = {
    "anon": FOR_USERS,
    "authenticated": FOR_USERS | {"private.caller_id()", "private.may_store_input(text)"},
    "service_role": {
        "public.delete_webhook(uuid)",
        "public.enable_webhook(uuid)",
        "public.grant_credits(uuid,integer,text,text)",
        "public.list_deliveries(text,integer)",
        "public.list_models()",
        "public.list_webhooks()",
        "public.ping()",
        "public.queue_health()",
        "public.queue_history(timestamp with time zone,integer)",
        "public.queue_report()",
        "public.pause_model(text,timestamp with time zone,text)",
        "public.redrive_failed(text,timestamp with time zone,integer)",
        "public.redeliver(uuid)",
        "public.redeliver_dead(uuid)",
        "public.register_webhook(text,text[],text)",
        "public.rotate_webhook_secret(uuid)",
        "public.resume_model(text)",
        "public.set_paid(uuid,timestamp with time zone)",
        "private.grant_credits(uuid,integer,text,text)",
        "private.list_models()",
        "private.pause_model(text,timestamp with time zone,text)",
        "private.redrive_failed(text,timestamp with time zone,integer)",
        "private.resume_model(text)",
        "private.set_paid(uuid,timestamp with time zone)",
    },
    "darkroom_worker": {
        "private.adopt_provider_job(uuid,bigint,text[])",
        "private.apply_retention(integer)",
        "private.begin_creates(uuid[],bigint[],bytea[])",
        "private.cancel_job(uuid,bigint,jsonb)",
        "private.check_setup(text[])",
        "private.checkpoint_jobs(uuid[],bigint[],text[])",
        "private.claim_deliveries(text,integer)",
        "private.claim_jobs(bigint,integer)",
        "private.complete_jobs(uuid[],bigint[],jsonb[],jsonb[])",
        "private.due_lanes()",
        "private.fail_jobs(uuid[],bigint[],text[],text[],double precision[],jsonb[])",
        "private.claim_receipts(integer)",
        "private.finish_delivery(uuid,bigint,text,integer,text,double precision,text)",
        "private.finish_receipts(uuid[],text[])",
        "private.forget_files(text[],text[])",
        "private.heartbeat(bigint,uuid[],bigint[],smallint[],boolean)",
        "private.list_expired_files(integer)",
        "private.pause_provider(text,integer,text,uuid)",
        "private.recall_create(uuid,bigint)",
        "private.recover_stale_jobs(integer)",
        "private.register_worker(text,integer,text)",
        "private.release_job(uuid,bigint,boolean)",
        "private.report_progress(uuid[],bigint[],text[],smallint[])",
        "private.sleep(bigint)",
        "private.unregister_worker(bigint)",
    },
    "darkroom_monitor": {
        "public.queue_health()",
        "public.queue_history(timestamp with time zone,integer)",
        "public.queue_report()",
    },
    "public": set(),
}

MAY_TOUCH = {
    "anon": {"private.shared_paths SELECT"},
    "authenticated": {
        "private.shared_paths SELECT",
        "public.batches SELECT",
        "public.credit_ledger SELECT",
        "public.entitlements SELECT",
        "public.generation_tags SELECT",
        "public.generations SELECT",
        "public.image_likes SELECT",
        "public.images SELECT",
        "public.prompt_templates SELECT",
    },
    "service_role": {
        "public.batches SELECT",
        "public.credit_ledger SELECT",
        "public.entitlements SELECT",
        "public.generation_tags SELECT",
        "public.generations SELECT",
        "public.image_likes SELECT",
        "public.images SELECT",
        "public.model_aliases DELETE",
        "public.model_aliases INSERT",
        "public.model_aliases SELECT",
        "public.model_aliases UPDATE",
        "public.models INSERT",
        "public.models SELECT",
        "public.models UPDATE",
        "public.prompt_templates DELETE",
        "public.prompt_templates INSERT",
        "public.prompt_templates SELECT",
        "public.prompt_templates UPDATE",
    },
    "darkroom_worker": set(),
    "darkroom_monitor": set(),
    "public": set(),
}


@pytest.fixture(scope="module")
def catalog(server, template):
    """One database for all tests here: they only read."""
    database = server.create(template)
    yield database
    server.drop(database)


def names(rows: list[dict[str, str]]) -> set[str]:
    """Return the first column."""
    return {next(iter(row.values())) for row in rows}


@pytest.mark.parametrize("role", ROLES)
def test_each_role_executes_exactly_these_functions(catalog, role):
    functions = catalog.execute(
        "select format('%%s.%%s', pronamespace::regnamespace,"
        " regexp_replace(oid::regprocedure::text, '^[a-z]+\\.', '')) as name from pg_proc"
        f" where pronamespace in {OURS} and has_function_privilege(%s, oid, 'execute')",
        role,
    )

    assert names(functions) == MAY_EXECUTE[role]


@pytest.mark.parametrize("role", ROLES)
def test_each_role_has_exactly_these_rights_on_tables_and_columns(catalog, role):
    rights = catalog.execute(
        "select format('%%s.%%s %%s', relnamespace::regnamespace, relname, right_name) as name"
        " from pg_class cross join unnest("
        "  '{SELECT,INSERT,UPDATE,REFERENCES,DELETE,TRUNCATE,TRIGGER}'::text[]) as right_name"
        f" where relnamespace in {OURS} and relkind in ('r', 'p', 'v', 'm', 'f') and ("
        "  has_table_privilege(%s, oid, right_name) or case"
        "    when right_name in ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')"
        "    then has_any_column_privilege(%s, oid, right_name) end)",
        role,
        role,
    )

    assert names(rights) == MAY_TOUCH[role]


@pytest.mark.parametrize("role", ROLES)
def test_no_role_has_rights_on_sequences(catalog, role):
    sequences = catalog.execute(
        "select format('%%I.%%I', schemaname, sequencename) as name from pg_sequences"
        " where schemaname in ('public', 'private') and has_sequence_privilege("
        "  %s, format('%%I.%%I', schemaname, sequencename), 'usage, select, update')",
        role,
    )

    assert sequences == []


def test_every_function_fixes_its_search_path_with_temporary_objects_last(catalog):
    assert not catalog.execute(
        f"select oid::regprocedure::text from pg_proc where pronamespace in {OURS}"
        " and not coalesce(proconfig, '{}') @> array['search_path=pg_catalog, pg_temp']"
    )


def test_who_forbids_a_kind_of_plan_forbids_jit_too(catalog):
    """It takes such a plan for an expensive one, and would compile for longer than it runs."""
    assert not catalog.execute(
        "select proname from pg_proc where pronamespace = 'private'::regnamespace"
        " and array_to_string(proconfig, ' ') like '%enable_%'"
        " and not proconfig @> array['jit=off']"
    )


CALLS_ONE = r"^\s+begin\s+return private\.\w+\([^;]*\);\s+end;\s+$"


def test_definers_are_private_or_the_operators_and_doors_only_call_them(catalog):
    public = catalog.execute(
        "select proname from pg_proc inner join pg_language as l on l.oid = prolang"
        " where pronamespace = 'public'::regnamespace"
        "  and (has_function_privilege('anon', pg_proc.oid, 'execute')"
        "   or has_function_privilege('authenticated', pg_proc.oid, 'execute') or not prosecdef)"
        "  and (prosecdef or not (lanname = 'sql' or prosrc ~ %s))",
        CALLS_ONE,
    )

    assert names(public) == set()


def test_no_function_has_two_forms(catalog):
    assert not catalog.execute(
        f"select proname from pg_proc where pronamespace in {OURS}"
        " group by pronamespace, proname having count(*) > 1"
    )


def test_no_function_waits_for_a_lock_that_anybody_can_take(catalog):
    taking = catalog.execute(
        f"select proname from pg_proc where pronamespace in {OURS} and prosrc ~ 'advisory'"
    )

    assert taking == []


def test_every_table_has_row_level_security(catalog):
    assert not catalog.execute(
        f"select oid::regclass::text from pg_class where relnamespace in {OURS}"
        " and relkind in ('r', 'p') and not relrowsecurity"
    )


def test_views_are_private_invokers_that_say_what_they_answer(catalog):
    assert not catalog.execute(
        f"select oid::regclass::text from pg_class where relnamespace in {OURS}"
        " and relkind in ('v', 'm') and (relkind = 'm'"
        "  or relnamespace <> 'private'::regnamespace or obj_description(oid) is null"
        "  or not coalesce(reloptions, '{}') @> '{security_invoker=true}')"
        " and oid <> 'private.shared_paths'::regclass"  # of a policy: it looks for everybody
    )


def test_no_table_users_read_refers_to_another(catalog):
    """PostgREST would embed one in the other, and that one again: an answer without end."""
    assert not catalog.execute(
        "select conname from pg_constraint where contype = 'f'"
        " and has_any_column_privilege('authenticated', conrelid, 'select')"
        " and has_any_column_privilege('authenticated', confrelid, 'select')"
    )


def test_every_foreign_key_starts_an_index(catalog):
    assert not catalog.execute(
        "select c.conname from pg_constraint as c where c.contype = 'f'"
        f" and c.connamespace in {OURS} and not exists ("
        "  select from pg_index as i where i.indrelid = c.conrelid and i.indpred is null"
        "  and (i.indkey::smallint[])[0:cardinality(c.conkey) - 1] @> c.conkey)"
    )


def test_every_table_and_every_function_somebody_may_call_has_a_comment(catalog):
    tables = catalog.execute(
        f"select oid::regclass::text from pg_class where relnamespace in {OURS}"
        " and relkind = 'r' and obj_description(oid) is null"
    )
    functions = catalog.execute(
        f"select oid::regprocedure::text from pg_proc where pronamespace in {OURS}"
        " and (pronamespace = 'public'::regnamespace"
        "   or has_function_privilege('darkroom_worker', oid, 'execute'))"
        " and obj_description(oid) is null"
    )

    assert names(tables) == names(functions) == set()


def test_every_column_with_a_state_or_a_unit_has_a_comment(catalog):
    columns = catalog.execute(
        "select format('%s.%s', a.attrelid::regclass, a.attname) as name from pg_attribute as a"
        " inner join pg_class as t on t.oid = a.attrelid"
        f" where t.relnamespace in {OURS} and t.relkind = 'r'"
        " and a.attname ~ '(^status|^stage|^outcome|credits|_seconds|_usd|_until)$'"
        " and col_description(a.attrelid, a.attnum) is null"
    )

    assert names(columns) == set()


def test_constraints_and_indexes_are_named_after_their_table(catalog):
    constraints = catalog.execute(
        "select conname from pg_constraint inner join pg_class as t on t.oid = conrelid"
        f" where connamespace in {OURS} and (not starts_with(conname, t.relname || '_')"
        "  or contype = 'c' and conname !~ '_(is|are|has|have|match|matches|leave|outlives)_')"
    )
    indexes = catalog.execute(
        "select c.relname from pg_index as i inner join pg_class as c on c.oid = i.indexrelid"
        f" inner join pg_class as t on t.oid = i.indrelid where t.relnamespace in {OURS}"
        " and c.relname !~ ('^' || t.relname || '_.*(idx|key|pkey)$')"
    )

    assert names(constraints) == names(indexes) == set()


def test_policies_are_sentences_about_the_signed_in(catalog):
    policies = catalog.execute(
        "select policyname, roles::text from pg_policies"
        " where policyname <> 'Everybody reads shared images'"
    )

    assert len(policies) == 13
    assert all(re.match(r"Users [a-z]+ their own ", policy["policyname"]) for policy in policies)
    assert {policy["roles"] for policy in policies} == {"{authenticated}"}


def test_visitors_have_one_policy(catalog):
    policies = catalog.execute(
        "select policyname, tablename, cmd from pg_policies where 'anon' = any(roles)"
    )

    assert policies == [
        {"policyname": "Everybody reads shared images", "tablename": "objects", "cmd": "SELECT"}
    ]


# The files.

FUNCTION = re.compile(
    r"^create (?:or replace )?function ([a-z0-9_.]+)\("
    r".*?(?:\bas \$\$\n(.*?)^\$\$;|^return ([^;]*);)",
    re.DOTALL | re.MULTILINE,
)
# Answers what it skipped to whoever calls it.
ONE_BY_ONE = "private.redrive_failed"
COMMENT_OR_TEXT = re.compile(r"--[^\n]*|[Ee]?'(?:[^']|'')*'|\"[^\"]*\"", re.DOTALL)


def functions() -> dict[str, str]:
    """Return the body of each function in sql/."""
    return {
        name: body or call
        for file in SQL_FILES
        for name, body, call in FUNCTION.findall(file.read_text())
    }


def code(text: str) -> str:
    """Return the text without comments, string literals and quoted names."""
    return COMMENT_OR_TEXT.sub("''", text)


@pytest.mark.parametrize("file", SQL_FILES, ids=lambda file: file.name)
class TestFile:
    def test_it_opens_with_prose(self, file: Path):
        first, *_ = re.split(r"\n(?!--)", file.read_text(), maxsplit=1)

        assert 2 <= len(first.splitlines()) <= 35

    def test_lines_are_short_and_end_cleanly(self, file: Path):
        lines = file.read_text().split("\n")

        assert [line for line in lines if len(line) > 100 or line != line.rstrip()] == []
        assert "\t" not in file.read_text()

    def test_code_is_lowercase(self, file: Path):
        assert re.findall(r".*[A-Z].*", code(file.read_text())) == []

    def test_every_raise_has_a_code_of_its_own(self, file: Path):
        raises = re.findall(r"\braise (?!notice)[^;]*;", file.read_text())

        bare = [each for each in raises if not re.search(r"^raise sqlstate '|errcode = '", each)]
        assert bare == []
        assert "40001" not in code(file.read_text()) and "sqlstate '40001" not in file.read_text()

    def test_whoever_catches_everything_says_what_it_skips(self, file: Path):
        text = file.read_text().replace(functions()[ONE_BY_ONE], "")
        caught = code(text).split("when others then")[1:]

        assert [each for each in caught if "private.note_skipped(" not in each[:400]] == []


def test_function_bodies_are_short():
    lengths = {name: body.count("\n") for name, body in functions().items()}

    assert {name: length for name, length in lengths.items() if length > 120} == {}
    assert statistics.median(lengths.values()) <= 20


def test_the_linter_sees_every_function(catalog):
    rows = catalog.execute(
        "select format('%s.%s', pronamespace::regnamespace, proname) as name from pg_proc"
        f" where pronamespace in {OURS}"
    )

    assert names(rows) == set(functions())
