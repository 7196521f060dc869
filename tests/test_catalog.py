"""Who may do what, and what must hold for every table and function, now and later."""

from __future__ import annotations

import re
import subprocess

import pytest

from stack import NODE_MODULES, PROJECT, node

OURS = "('public'::regnamespace, 'private'::regnamespace)"
# Whoever has not signed in is told so by the function: each is a door and a definer behind it.
OF_USERS = """
    cancel_batch cancel_generation delete_generation delete_prompt_template enqueue_batch
    enqueue_generation get_batch_status get_entitlement get_job_status like_image list_active_jobs
    list_generations list_models list_prompt_templates list_public_images register_push_token
    restore_generation retry_generation save_prompt_template set_favorite set_tags share_image
    unregister_push_token
"""
OF_OPERATORS = """
    apply_billing_event delete_webhook enable_webhook export_user grant_credits list_deliveries
    list_models list_webhooks merge_user pause_model ping queue_health queue_history queue_job
    queue_report redeliver redeliver_dead redrive_failed register_webhook resume_model
    rotate_webhook_secret set_paid
"""
OF_WORKERS = """
    apply_retention cancel_job check_setup claim_deliveries claim_jobs complete_jobs due_lanes
    fail_jobs claim_receipts finish_delivery finish_receipts forget_files heartbeat
    list_expired_files list_providers next_steps pause_provider recover_stale_jobs register_worker
    release_job report_progress sleep unregister_worker
    adopt_provider_job begin_creates checkpoint_jobs recall_create
"""
OF_ROWS = " credit_products model_aliases prompt_templates "
READ_BY_USERS = """
    batches credit_ledger entitlements generation_tags generations image_likes images
    prompt_templates
"""


def of(schema: str, names: str, right: str = "") -> set[str]:
    """Return the names with their schema, each with the right."""
    return {f"{schema}.{name}{right and ' ' + right}" for name in names.split()}


FOR_USERS = of("public", OF_USERS + "ping") | of("private", OF_USERS)
MAY_EXECUTE: dict[str, set[str]] = {
    "anon": FOR_USERS,
    "authenticated": FOR_USERS | of("private", "caller_id may_store_input own_folders"),
    "service_role": of("public", OF_OPERATORS) | {"private.list_models"},
    "darkroom_worker": of("private", OF_WORKERS),
    "darkroom_monitor": of("public", "queue_health queue_history queue_job queue_report"),
    "public": set(),
}
MAY_TOUCH: dict[str, set[str]] = {
    "anon": {"private.shared_paths SELECT"},
    "authenticated": of("public", READ_BY_USERS, "SELECT") | {"private.shared_paths SELECT"},
    "service_role": of("public", READ_BY_USERS, "SELECT")
    | of("public", OF_ROWS + "models", "SELECT")
    | of("public", OF_ROWS + "models", "INSERT")
    | of("public", OF_ROWS + "models", "UPDATE")
    | of("public", OF_ROWS, "DELETE"),
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


@pytest.mark.parametrize("role", MAY_EXECUTE)
def test_each_role_executes_exactly_these_functions(catalog, role):
    functions = catalog.execute(
        "select format('%%s.%%s', pronamespace::regnamespace, proname) from pg_proc"
        f" where pronamespace in {OURS} and has_function_privilege(%s, oid, 'execute')",
        role,
    )

    assert names(functions) == MAY_EXECUTE[role]


@pytest.mark.parametrize("role", MAY_TOUCH)
def test_each_role_has_exactly_these_rights_on_tables_columns_and_sequences(catalog, role):
    rights = catalog.execute(
        "select format('%%s.%%s %%s', relnamespace::regnamespace, relname, right_name)"
        " from pg_class cross join unnest("
        "  '{SELECT,INSERT,UPDATE,REFERENCES,DELETE,TRUNCATE,TRIGGER}'::text[]) as right_name"
        f" where relnamespace in {OURS} and relkind in ('r', 'p', 'v', 'm', 'f') and ("
        "  has_table_privilege(%s, oid, right_name) or case"
        "    when right_name in ('SELECT', 'INSERT', 'UPDATE', 'REFERENCES')"
        "    then has_any_column_privilege(%s, oid, right_name) end)"
        " union all select oid::regclass::text from pg_class"
        f" where relnamespace in {OURS} and case relkind when 'S'"
        "  then has_sequence_privilege(%s, oid, 'usage, select, update') end",
        role,
        role,
        role,
    )

    assert names(rights) == MAY_TOUCH[role]


CALLS_ONE = r"^\s+begin\s+return private\.\w+\([^;]*\);\s+end;\s+$"
# Each query finds what breaks the rule.
RULES = {
    "the search_path of every function is fixed, with temporary objects last": f"""
        select oid::regprocedure::text from pg_proc where pronamespace in {OURS}
          and not coalesce(proconfig, '{{}}') @> array['search_path=pg_catalog, pg_temp']""",
    "definers are private or the operators', and doors only call them": f"""
        select proname from pg_proc as p inner join pg_language as l on l.oid = p.prolang
        where pronamespace = 'public'::regnamespace
          and (has_function_privilege('anon', p.oid, 'execute')
            or has_function_privilege('authenticated', p.oid, 'execute') or not prosecdef)
          and (prosecdef or not (lanname = 'sql' or prosrc ~ '{CALLS_ONE}'))""",
    "no function has two forms, for rights go by name": f"""
        select proname from pg_proc where pronamespace in {OURS}
        group by pronamespace, proname having count(*) > 1""",
    "no function waits for a lock that anybody can take": f"""
        select proname from pg_proc where pronamespace in {OURS} and prosrc ~ 'advisory'""",
    "no function answers with the code that PostgREST tries again without end": f"""
        select proname from pg_proc where pronamespace in {OURS} and prosrc ~ '40001'""",
    "every table has row level security": f"""
        select oid::regclass::text from pg_class
        where relnamespace in {OURS} and relkind in ('r', 'p') and not relrowsecurity""",
    "views are private invokers, but for the one of a policy, which looks for everybody": f"""
        select oid::regclass::text from pg_class
        where relnamespace in {OURS} and relkind in ('v', 'm')
          and oid <> 'private.shared_paths'::regclass
          and (relkind = 'm' or relnamespace <> 'private'::regnamespace
            or not coalesce(reloptions, '{{}}') @> '{{security_invoker=true}}')""",
    "policies are for the signed in, but for the one on shared files": """
        select policyname from pg_policies where roles <> '{authenticated}'
          and (policyname, tablename, cmd)
            <> ('Everybody reads shared images', 'objects', 'SELECT')""",
    # PostgREST would embed one in the other, and that one again: an answer without end.
    "no table users read refers to another": """
        select conname from pg_constraint where contype = 'f'
          and has_any_column_privilege('authenticated', conrelid, 'select')
          and has_any_column_privilege('authenticated', confrelid, 'select')""",
    "every foreign key starts an index, but of the catalogue's few rows": f"""
        select c.conname from pg_constraint as c where c.contype = 'f'
          and c.conrelid not in ('public.models'::regclass, 'private.model_routes'::regclass,
            'private.provider_words'::regclass)
          and c.connamespace in {OURS} and not exists (
            select from pg_index as i where i.indrelid = c.conrelid and i.indpred is null
              and (i.indkey::smallint[])[0:cardinality(c.conkey) - 1] @> c.conkey)""",
}


@pytest.mark.parametrize("rule", RULES)
def test_the_catalogue_keeps_the_rule(catalog, rule):
    assert names(catalog.execute(RULES[rule])) == set()


def test_whoever_catches_everything_says_what_it_skips(catalog):
    comment_or_text = re.compile(r"--[^\n]*|[Ee]?'(?:[^']|'')*'")
    rows = catalog.execute(
        f"select proname, prosrc from pg_proc where pronamespace in {OURS}"
        " and proname <> 'redrive_failed'"  # which says it to its caller
    )
    for row in rows:
        caught = comment_or_text.sub("", row["prosrc"]).split("when others then")[1:]
        assert all("private.note_skipped(" in each[:400] for each in caught), row["proname"]


@pytest.mark.parametrize(
    "check",
    [
        "lint --schema=public,private --fail-on=warning",
        "advisors --type=all --level=warn --fail-on=warn",
    ],
)
def test_supabases_own_linters_find_nothing_to_warn_of(stack, check):
    cli = [str(node()), str(NODE_MODULES / "supabase/dist/supabase.js"), "db"]
    command = [*cli, *check.split(), f"--remote={stack.database_url}"]

    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
