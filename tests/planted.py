"""Bugs to plant, each with the test that must notice it: data for test_planted.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """A change of one file: what stands there once, what takes its place, and what then fails."""

    name: str
    file: str
    old: str
    new: str
    test: str


FUZZ = "tests/test_security_rpc.py::test_"
RPC = f"{FUZZ}no_call_fails_tells_of_others_or_writes_although_refused"
WORDS = f"{FUZZ}whatever_it_is_given_a_function_answers_or_refuses_in_our_words"
RETENTION = "tests/test_retention.py::test_"
MODEL = "tests/test_money_model.py::test_money_is_what_the_model_says_whatever_happens"
BAD_ROWS = (
    f"{RETENTION}more_bad_rows_than_are_looked_at_are_passed_over_and_named_and_all_others_done"
)
IDENTITIES = "tests/test_identities.py::test_"
PROCESS = "tests/test_worker_process.py::test_"
PROVIDERS = "tests/test_worker_providers.py::test_"
PURCHASE = "tests/test_purchase.py::test_"
WEBHOOKS = "tests/test_webhook_functions.py::test_"
SAFE_PATH = "tests/test_security_search_path.py::test_no_function_picks_up_what_its_caller_planted"

SECURITY = [
    # Small in, huge out.
    Bug(
        "params are written out before anything has looked at their numbers",
        "sql/30_gating.sql",
        "    where abs(n.value::numeric) >= 1e400 or scale(n.value::numeric) > 400\n",
        "    where false\n",
        "tests/test_security_rpc.py::test_no_call_costs_more_than_it_weighs[authenticated]",
    ),
    Bug(
        "users' requests last as long as they like",
        "sql/00_setup.sql",
        "    alter role authenticated set statement_timeout = '8s';\n",
        "",
        "tests/test_setup.py::"
        "test_the_roles_it_makes_have_their_requests_ended_and_others_stay_as_they_are",
    ),
    # Rows.
    Bug(
        "a policy lets users read everybody's generations",
        "sql/20_access.sql",
        "using (user_id = (select private.caller_id()) and deleted_at is null);",
        "using (deleted_at is null);",
        "tests/test_access.py::test_users_read_their_own_rows_only",
    ),
    Bug(
        "row level security is off for the ledger",
        "sql/20_access.sql",
        "alter table public.credit_ledger enable row level security;\n",
        "",
        "tests/test_catalog.py::test_the_catalogue_keeps_the_rule"
        "[every table has row level security]",
    ),
    Bug(
        "row level security is off for webhooks, and a gateway grants all",
        "sql/96_webhooks.sql",
        "alter table private.webhook_endpoints enable row level security;\n",
        "",
        "tests/test_security_rows.py::test_no_outsider_reads_or_changes_a_row",
    ),
    Bug(
        "users may insert into the ledger",
        "sql/95_gallery.sql",
        "grant select on table public.prompt_templates to authenticated;",
        "grant select on table public.prompt_templates to authenticated;\n"
        "grant insert on table public.credit_ledger to authenticated;",
        "tests/test_catalog.py::test_each_role_has_exactly_these_rights_on_tables_columns_and_sequences"
        "[authenticated]",
    ),
    Bug(
        "users read each other's source images",
        "sql/20_access.sql",
        '"Users read their own input images" on storage.objects\n'
        "  for select to authenticated using (\n"
        "    bucket_id = 'inputs'\n"
        "    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])\n",
        '"Users read their own input images" on storage.objects\n'
        "  for select to authenticated using (\n    bucket_id = 'inputs'\n",
        "tests/test_http_storage.py::test_no_spelling_opens_changes_or_lists_anothers_file",
    ),
    Bug(
        "an input may be moved into another's folder",
        "sql/20_access.sql",
        "  ) with check (\n"
        "    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text\n"
        "    and private.may_store_input(name)\n  );\n"
        '  create policy "Users delete',
        '  ) with check (true);\n  create policy "Users delete',
        "tests/test_access.py::test_an_input_cannot_be_moved_into_another_folder_or_bucket",
    ),
    Bug(
        "an export shows what providers said",
        "sql/87_export.sql",
        "to_jsonb(c) - %L::text[] from",
        "to_jsonb(c) - array[left(%L, 0)] from",
        "tests/test_export.py"
        "::test_all_that_is_known_of_a_user_is_told_and_nothing_of_the_operators_or_others",
    ),
    Bug(
        "an export leaves out what users like",
        "sql/95_gallery.sql",
        "('public.image_likes'), ",
        "",
        "tests/test_export.py::test_no_table_that_holds_something_of_a_user_is_forgotten",
    ),
    Bug(
        "an input may have the name of its folder",
        "sql/20_access.sql",
        '    and private.may_store_input(name)\n  );\n  create policy "Users replace',
        '  );\n  create policy "Users replace',
        "tests/test_access.py::test_an_input_has_a_name_of_its_own_below_the_folder",
    ),
    Bug(
        "the app's own tables lose the API roles' rights",
        "sql/00_setup.sql",
        "create schema private;\n",
        "create schema private;\n"
        "alter default privileges in schema public revoke all on tables from anon;\n",
        "tests/test_setup.py::test_what_the_app_makes_later_is_granted_as_if_darkroom_were_not_there",
    ),
    Bug(
        "a monitor reads why the provider refused",
        "sql/88_health.sql",
        "when v_is_operator then '{}' else '{\"pause_reason\": null}'::jsonb end",
        "when true then '{}'::jsonb end",
        "tests/test_report.py::test_nobodys_words_and_ids_are_in_what_a_monitor_may_call",
    ),
    Bug(
        "a monitor reads what the provider said of a job",
        "sql/97_reports.sql",
        "'error_detail', case when v_is_operator then a.error_detail end",
        "'error_detail', a.error_detail",
        "tests/test_report.py::test_nobodys_words_and_ids_are_in_what_a_monitor_may_call",
    ),
    Bug(
        "what its users cause raises the alert about the last jobs",
        "sql/88_health.sql",
        "(a.outcome = 'failed' and e.blames_user is not true)",
        "a.outcome = 'failed'",
        "tests/test_health.py"
        "::test_a_quarter_of_the_last_jobs_failed_however_long_ago_and_not_by_their_users",
    ),
    Bug(
        "everybody reads every generated image",
        "sql/95_gallery.sql",
        "    and exists (select from private.shared_paths as s where s.path = objects.name)\n",
        "",
        "tests/test_http_storage.py::test_no_spelling_opens_changes_or_lists_anothers_file",
    ),
    # Functions.
    Bug(
        "a job is found whoever asks",
        "sql/60_status.sql",
        "where (p_user_id is null or (g.user_id = p_user_id and g.deleted_at is null))",
        "where (p_user_id is null or g.deleted_at is null)",
        f"{RPC}[get_job_status]",
    ),
    Bug(
        "a list shows jobs of others if their ids are known",
        "sql/60_status.sql",
        "private.jobs_json(v_ids || p_job_ids, v_user_id)",
        "private.jobs_json(v_ids || p_job_ids)",
        "tests/test_status.py::test_the_list_is_of_active_jobs_newest_first_and_of_those_asked_for",
    ),
    Bug(
        "a template of another user is overwritten",
        "sql/95_gallery.sql",
        "    where id = p_id and user_id = v_user_id\n",
        "    where id = p_id\n",
        "tests/test_gallery.py::test_templates_of_others_and_of_the_app_cannot_be_changed",
    ),
    Bug(
        "shared images tell their prompts",
        "sql/95_gallery.sql",
        "'prompt', case when i.shows_prompt then i.prompt end,",
        "'prompt', i.prompt,",
        f"{RPC}[list_public_images]",
    ),
    Bug(
        "a cast error of PostgreSQL reaches clients",
        "sql/60_status.sql",
        "  if cardinality(p_job_ids) > 100 or array_ndims(p_job_ids) > 1 then",
        "  if cardinality(p_job_ids) > 100 then",
        f"{WORDS}[list_active_jobs]",
    ),
    Bug(
        "a grant overflows the balance",
        "sql/40_credits.sql",
        "if v_has.credits::bigint - v_has.debt + p_amount\n"
        "      not between -1000000000 and 1000000000 - v_charged then",
        "if v_has.credits - v_has.debt + p_amount < -1000000000 then",
        f"{WORDS}[grant_credits]",
    ),
    Bug(
        "everybody may grant credits",
        "sql/92_rights.sql",
        "-- The operator's backend.\n",
        "grant execute on function public.grant_credits to authenticated;\n",
        "tests/test_catalog.py::test_each_role_executes_exactly_these_functions[authenticated]",
    ),
    Bug(
        "a definer looks for types among the caller's temporary ones",
        "sql/50_enqueue.sql",
        "security definer set search_path = pg_catalog, pg_temp",
        "security definer set search_path = ''",
        f"{SAFE_PATH}[authenticated]",
    ),
    Bug(
        "a definer takes the caller's search_path",
        "sql/72_claim.sql",
        "security definer set search_path = pg_catalog, pg_temp",
        "security definer",
        f"{SAFE_PATH}[darkroom_worker]",
    ),
    Bug(
        "a definer stands in the exposed schema",
        "sql/91_doors.sql",
        "stable set search_path = pg_catalog, pg_temp\nreturn private.get_entitlement();",
        "stable security definer set search_path = pg_catalog, pg_temp\n"
        "return private.get_entitlement();",
        "tests/test_catalog.py::test_the_catalogue_keeps_the_rule"
        "[definers are private or the operators', and doors only call them]",
    ),
    # Refusals.
    Bug(
        "a database that cannot be written shows PostgreSQL's own words",
        "sql/30_gating.sql",
        "  elsif p_writes then\n    perform private.require_writable();\n",
        "",
        "tests/test_gating.py::test_what_changes_something_says_that_it_cannot",
    ),
    Bug(
        "a read-only database takes jobs through PostgREST",
        "sql/30_gating.sql",
        "    and current_setting('default_transaction_read_only') = 'off' then\n",
        "    then\n",
        "tests/test_gating.py::test_what_changes_something_says_that_it_cannot",
    ),
    Bug(
        "an enqueue does not ask whether it may write",
        "sql/50_enqueue.sql",
        "    or current_setting('default_transaction_read_only') <> 'off' then\n",
        "    then\n",
        "tests/test_gating.py::test_what_changes_something_says_that_it_cannot",
    ),
    Bug(
        "a sub that is no uuid is PostgreSQL's to refuse",
        "sql/20_access.sql",
        "exception when data_exception then\n",
        "exception when division_by_zero then\n",
        "tests/test_gating.py::test_a_token_that_names_no_user_who_is_here_is_not_authenticated",
    ),
    Bug(
        "a prompt of fillers is charged",
        "sql/32_input.sql",
        "\\u3000\\u3164\\ufe00",
        "\\u3000\\ufe00",
        "tests/test_gating.py::test_a_prompt_is_there_and_not_too_long",
    ),
    Bug(
        "the key of a deleted job answers a job that nobody finds",
        "sql/50_enqueue.sql",
        "    elsif v_known.deleted_at is not null then\n",
        "    elsif false then\n",
        "tests/test_enqueue.py"
        "::test_the_key_of_a_deleted_job_is_not_found_until_it_is_restored_or_erased",
    ),
    Bug(
        "the queue is looked at for each job of a list",
        "sql/60_status.sql",
        "unnest(private.forecast_jobs(p_ids)) as f",
        "unnest(private.forecast_jobs(array[g.id])) as f",
        "tests/test_status.py::test_a_list_looks_at_the_queue_once_and_tells_of_each_job_as_alone",
    ),
    # Addresses.
    Bug(
        "a source image may be anybody's",
        "sql/32_input.sql",
        "        private.owner_of(private.path_id(p.part[2], 1)) = p_user_id\n"
        "        and private.is_plain",
        "        private.is_plain",
        "tests/test_input.py"
        "::test_a_source_image_is_an_own_file_or_an_own_finished_picture_and_nothing_else",
    ),
    Bug(
        "a source's name is part of its signed address as it stands",
        "worker.py",
        """return quote(path if named else f"inputs/{path}", safe="/!$&'()*+,;=:@")""",
        """return path if named else f"inputs/{path}\"""",
        "tests/test_worker_storage.py"
        "::test_a_source_is_given_as_a_signed_address_of_its_own_where_storage_is_public",
    ),
    Bug(
        "outputs are fetched from any host",
        "worker.py",
        'if not is_base and not (url.scheme == "https" and is_named):',
        "if url.scheme not in ('http', 'https'):",
        "tests/test_worker_units.py::test_outputs_from_elsewhere_are_refused_and_not_fetched",
    ),
    Bug(
        "a provider's key goes where its pictures are",
        "worker.py",
        'self._allowed(request["url"], self.key_hosts)',
        'self._allowed(request["url"], self.hosts)',
        "tests/test_worker_units.py::test_nothing_is_sent_to_where_the_key_does_not_belong",
    ),
    Bug(
        "a prompt that looks like base64 is hidden from who looks for it",
        "worker.py",
        " and text not in self.asked  # a prompt may look like it",
        "",
        "tests/test_worker_units.py::test_an_answer_is_handed_in_as_the_database_can_take_it",
    ),
    Bug(
        "redirects of outputs are followed anywhere",
        "worker.py",
        'url = self._allowed(response.headers["location"], self.hosts, url)',
        'url = url.join(response.headers["location"])',
        "tests/test_worker_units.py::test_a_redirect_is_held_to_the_same_hosts",
    ),
    Bug(
        "webhooks may call private addresses",
        "outbox.py",
        "not in self.allowed_hosts and not all(map(is_public, addresses)):",
        "not in self.allowed_hosts and not any(map(is_public, addresses)):",
        "tests/test_worker_webhooks.py::test_a_name_with_one_private_address_is_not_called_at_all",
    ),
    Bug(
        "a webhook's name is looked up again to connect",
        "outbox.py",
        "return await self.backend.connect_tcp(addresses[-1], port, *rest, **more)",
        "return await self.backend.connect_tcp(host, port, *rest, **more)",
        "tests/test_worker_webhooks.py"
        "::test_a_name_that_leads_elsewhere_the_second_time_is_looked_up_once_and_by_no_proxy",
    ),
    Bug(
        "webhooks may be registered for private addresses",
        "sql/96_webhooks.sql",
        "[a-z][a-z0-9-]{0,61}[a-z0-9]$'\n        then 'not a full host name'\n",
        "[a-z][a-z0-9-]{0,61}[a-z0-9]$'\n        then null\n",
        "tests/test_outbox.py"
        "::test_addresses_on_the_internet_are_taken_and_what_may_lead_inside_is_refused",
    ),
    # Files.
    Bug(
        "a bomb is decoded",
        "pictures.py",
        "> MAX_IMAGE_PIXELS:\n        raise NotTaken",
        "> 100 * MAX_IMAGE_PIXELS:\n        raise NotTaken",
        "tests/test_worker_storage.py::test_a_bomb_is_refused_before_it_is_decoded",
    ),
    Bug(
        "a stored picture tells its prompt",
        "pictures.py",
        "                cuts.append(cut)\n",
        "                pass\n",
        "tests/test_worker_storage.py::test_what_is_stored_shows_the_same_and_tells_nothing",
    ),
    Bug(
        "one bad output costs the good ones",
        "worker.py",
        '                if error.code == "storage_unavailable":  # another',
        "                if error.code:  # another",
        "tests/test_worker_storage.py"
        "::test_outputs_that_are_good_are_kept_without_gaps_and_else_the_first_says_why",
    ),
    Bug(
        "what is refused by rules of ours is bought again",
        "pictures.py",
        'code = "output_refused"',
        'code = "provider_error"',
        "tests/test_worker_storage.py"
        "::test_a_whole_file_of_a_kind_or_size_that_is_not_taken_is_refused_and_not_read_again",
    ),
    Bug(
        "an output that came broken is bought again at once",
        "worker.py",
        'if failure.code == "output_refused" or attempt == HTTP_TRIES:',
        "if failure:",
        "tests/test_worker_storage.py"
        "::test_an_output_that_comes_broken_is_read_again_before_it_is_given_up",
    ),
    Bug(
        "a picture may take any time",
        "pictures.py",
        "PICTURE_SECONDS = 3 ",
        "PICTURE_SECONDS = 300 ",
        "tests/test_worker_storage.py::test_a_source_that_costs_too_much_is_the_users_fault",
    ),
    Bug(
        "a picture may take any memory",
        "pictures.py",
        "        (resource.RLIMIT_AS, pages * resource.getpagesize() + means),\n",
        "",
        "tests/test_worker_storage.py::test_memory_that_was_not_foreseen_is_refused",
    ),
    Bug(
        "large pictures are decoded all at once",
        "pictures.py",
        "(LARGE_BYTES, asyncio.Semaphore(1)),",
        "(LARGE_BYTES, asyncio.Semaphore(9)),",
        "tests/test_worker_storage.py::test_large_pictures_at_once_stay_within_the_units_memory",
    ),
    Bug(
        "the log repeats what a provider says",
        "worker.py",
        "        self.reason = detail if reason is None else reason\n",
        "        self.reason = detail\n",
        "tests/test_worker_units.py::test_the_reason_in_the_log_holds_no_words_of_a_provider",
    ),
    Bug(
        "the end user says who is responsible",
        "scripts/model_mapper.py",
        'r"(^|_)(end_?)?(users?|',
        'r"(^|_)(end_?)?(nobody|',
        "tests/test_import.py::test_what_may_harm_or_takes_an_address_is_the_operators",
    ),
    Bug(
        "the map that a ControlNet answers is sold for the picture",
        "scripts/model_mapper.py",
        "if (grows and not example) or len(shown) > asked:",
        "if grows and not example:",
        "tests/test_import.py::test_the_example_tells_what_is_made_and_which_of_several_outputs_is_the"
        "_picture",
    ),
    Bug(
        "a model of videos is for sale",
        "scripts/model_mapper.py",
        "if media and len(media) >= len(",
        "if media and len(media) > 9 + len(",
        "tests/test_import.py::test_what_cannot_be_mapped_is_refused_with_the_reason",
    ),
    Bug(
        "a count that is a text is charged as the most there can be",
        "sql/50_enqueue.sql",
        "    when 'string' then coalesce(\n",
        "    when 'text' then coalesce(\n",
        "tests/test_input.py::test_a_count_may_be_a_text_of_the_models",
    ),
    Bug(
        "an SVG is stored as it came",
        "pictures.py",
        'clean = filter_svg(source, {"image": ["png", "jpeg", "gif", "webp"]})',
        "clean = source",
        "tests/test_worker_storage.py::test_nothing_dangerous_is_left_of_an_svg",
    ),
    Bug(
        "an SVG is served as one",
        "worker.py",
        'served_as = INERT_TYPE if image.format == "SVG" else content_type',
        "served_as = content_type",
        "tests/test_worker_storage.py::test_an_svg_is_stored_clean_and_under_a_type_no_browser_runs",
    ),
    # Secrets.
    Bug(
        "a password that is not encoded is logged",
        "worker.py",
        "        except psycopg.ProgrammingError as error:  # it shows the password,",
        "        except ZeroDivisionError as error:  #",
        "tests/test_worker_units.py::test_a_bad_variable_is_named_but_not_shown",
    ),
    Bug(
        "what a library says of an error is kept",
        "worker.py",
        'detail = f"{type(error).__name__} at {frame.name}:{frame.lineno}"',
        'detail = f"{type(error).__name__}: {error}"',
        "tests/test_worker_units.py"
        "::test_an_unexpected_error_tells_its_type_and_place_but_not_its_text",
    ),
    Bug(
        "the address of a webhook is logged",
        "outbox.py",
        '"delivery.%s delivery=%s lane=%s',
        '"delivery.%s url=" + str(delivery.url).replace("%", "%%") + " delivery=%s lane=%s',
        "tests/test_security_secrets.py::test_secrets_of_the_worker_are_nowhere_whatever_happens",
    ),
    Bug(
        "the database's password is on the command line of the Supabase CLI",
        "scripts/stack.py",
        'f"--remote={remote}"',
        'f"--remote={database_url}"',
        "tests/test_security_secrets.py"
        "::test_the_command_line_of_the_supabase_cli_shows_no_password",
    ),
    Bug(
        "what decodes pictures knows the worker's secrets",
        "pictures.py",
        "env={name: os.environ[name] for name in public},",
        "env=dict(os.environ),",
        f"{PROCESS}a_killed_workers_job_is_finished_by_another_and_charged_once",
    ),
    Bug(
        "the worker may gain privileges",
        "worker.service",
        "CapabilityBoundingSet=\n",
        "",
        "tests/test_worker_service.py::test_the_worker_is_hardly_exposed",
    ),
    # Files that are others', or erased.
    Bug(
        "a source image is any file of that name, or none",
        "sql/32_input.sql",
        "        and private.file_changed_at('inputs', p.part[2]) is null\n",
        "        and private.file_changed_at('inputs', p.part[2]) > now()\n",
        "tests/test_input.py::test_a_source_image_is_there",
    ),
    Bug(
        "a stranger's picture is a source",
        "sql/32_input.sql",
        "          and m.user_id = p_user_id and g.deleted_at is null\n",
        "          and g.deleted_at is null\n",
        "tests/test_input.py"
        "::test_a_source_image_is_an_own_file_or_an_own_finished_picture_and_nothing_else",
    ),
    Bug(
        "a picture is erased under the job that is made from it",
        "sql/85_retention.sql",
        "    ) and not private.is_source(g.id)\n",
        "    )\n",
        f"{RETENTION}pictures_that_a_live_job_is_made_from_outlive_their_time_and_no_others[old]",
    ),
    Bug(
        "the preview of every image is everybody's",
        "sql/95_gallery.sql",
        "select i.preview_path as path from public.images as i\nwhere i.share_id is not null",
        "select i.preview_path as path from public.images as i\nwhere true",
        "tests/test_gallery.py"
        "::test_the_files_of_a_shared_image_are_seen_by_all_until_the_share_ends",
    ),
    Bug(
        "a file is forgotten though Storage still has it",
        "sql/84_erasure.sql",
        "    and private.file_changed_at(f.bucket, f.path) is null;",
        ";",
        f"{RETENTION}what_storage_still_has_is_not_forgotten_and_the_rest_is_once",
    ),
    Bug(
        "the previews of a deleted user stay",
        "sql/84_erasure.sql",
        "values (i.storage_path), (i.preview_path)) as f (path)\n    where i.user_id",
        "values (i.storage_path)) as f (path)\n    where i.user_id",
        f"{RETENTION}deleting_a_user_leaves_nothing_but_the_list_of_files",
    ),
    Bug(
        "an edge function takes its caller's credentials along a redirect",
        "supabase/functions/get_job_status/index.ts",
        'redirect: "error"',
        'redirect: "follow"',
        "tests/test_functions.py"
        "::test_a_gateway_that_is_away_moved_or_cannot_write_is_unavailable[get_job_status]",
    ),
    Bug(
        "credits are given to whoever writes as if he were Stripe",
        "supabase/functions/stripe_webhook/index.ts",
        "if (!(await Promise.all(verified)).includes(true))",
        "if (!(await Promise.all(verified)).length)",
        f"{WEBHOOKS}stripe_is_known_by_a_fresh_signature_with_a_secret_of_ours",
    ),
    Bug(
        "an event that somebody recorded may be sent again for ever",
        "supabase/functions/stripe_webhook/index.ts",
        "- Number(time)) > 300)",
        "- Number(time)) > 1e9)",
        f"{WEBHOOKS}stripe_is_known_by_a_fresh_signature_with_a_secret_of_ours",
    ),
    Bug(
        "an event that the database could not take is answered as taken",
        "supabase/functions/revenuecat_webhook/index.ts",
        "  if (outcome) return",
        "  if (reply.ok) return",
        f"{WEBHOOKS}what_the_database_could_not_take_is_sent_again",
    ),
    # Installed and restored.
    Bug(
        "where there is data any yes will do",
        "scripts/migrate.py",
        'wanted = name if has_data else "y"',
        'wanted = "y"',
        "tests/test_migrate.py::test_it_shows_what_is_there_and_what_it_will_do_and_no_is_no",
    ),
    Bug(
        "the buckets are public",
        "sql/90_schedule.sql",
        "'generations', 'generations', false,",
        "'generations', 'generations', true,",
        "tests/test_schedule.py::test_buckets_are_private_and_take_images_only",
    ),
    Bug(
        "a migration whose file changed is passed over",
        "scripts/migrate.py",
        "return not is_first_edition and squeeze",
        "return is_first_edition and squeeze",
        "tests/test_migrate.py::test_a_file_that_changed_after_it_was_applied_is_refused_until_it_is"
        "_as_recorded",
    ),
    Bug(
        "an app's view goes with what it shows",
        "sql/uninstall.sql",
        "  if v_found is not null then",
        "  if v_found = '' then",
        "tests/test_uninstall.py::test_it_refuses_where_something_would_be_lost_and_changes_nothing",
    ),
    Bug(
        "an app's own table goes where the gallery was left out",
        "sql/uninstall.sql",
        ") or to_regclass('private.shared_paths') is not null",
        ") or true",
        "tests/test_uninstall.py::test_it_leaves_what_was_there_whatever_parts_were_installed",
    ),
    # Who is told.
    Bug(
        "anybody takes a push token back",
        "sql/96_webhooks.sql",
        "delete from private.push_tokens where token = p_token and user_id = v_user_id;",
        "delete from private.push_tokens where token = p_token;",
        "tests/test_outbox.py::test_a_device_is_not_told_any_more[late]",
    ),
    Bug(
        "a device that is somebody else's is told",
        "sql/96_webhooks.sql",
        "on t.token = p_delivery.push_token and t.user_id = g.user_id",
        "on t.token = p_delivery.push_token",
        "tests/test_outbox.py::test_a_device_is_not_told_any_more[somebody else's]",
    ),
    Bug(
        "a webhook's secret is shown again",
        "sql/96_webhooks.sql",
        "'webhook_id', p_endpoint.id, 'url', p_endpoint.url,",
        "'webhook_id', p_endpoint.id, 'secret', p_endpoint.secret, 'url', p_endpoint.url,",
        "tests/test_outbox.py"
        "::test_a_secret_is_32_random_bytes_shown_once_and_for_a_day_after_a_rotation_both_sign",
    ),
    Bug(
        "everybody listens to everybody's hints",
        "sql/65_realtime.sql",
        "      and topic = 'user:' || (select auth.uid())::text\n",
        "",
        "tests/test_realtime.py::test_users_join_their_own_topic_and_no_other",
    ),
    Bug(
        "users put files into anybody's input folder",
        "sql/20_access.sql",
        "for insert to authenticated with check (\n"
        "    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text\n",
        "for insert to authenticated with check (\n    bucket_id = 'inputs'\n",
        "tests/test_http_storage.py"
        "::test_users_put_and_replace_files_in_their_own_input_folder_only",
    ),
]
STATES = "tests/test_protocol.py::test_no_schedule_of_claims_ends_clocks_and_recovery_breaks_a_rule"
CIRCLE = "tests/test_locks.py::test_nobody_can_wait_in_a_circle"
LOOKS = "tests/test_worker_units.py::test_who_goes_to_sleep_looks_for_what_came_meanwhile"

EACH_CALL = (
    "tests/test_misbehaviour.py::test_whichever_call_fails_each_job_is_made_once_and_from_its_own"
)

MONEY = [
    # Users in several databases.
    Bug(
        "files of users of another database are taken for left over",
        "sql/85_retention.sql",
        "          and private.has_folder(private.path_id(o.name, 1))\n",
        "",
        f"{RETENTION}a_folder_of_another_database_is_left_alone",
    ),
    Bug(
        "a user of another database is made here, too",
        "sql/42_identities.sql",
        "  if private.follow_elsewhere(p_user_id) then\n",
        "  if false then\n",
        f"{IDENTITIES}who_lives_in_another_database_is_not_made_here",
    ),
    Bug(
        "a user is packed while a call has looked and not written yet",
        "deploy/cells/move.sql",
        "  perform pg_advisory_xact_lock(hashtextextended(p_user_id::text, 0));\n",
        "",
        "tests/test_cells_moves.py::test_a_call_that_has_looked_where_the_user_lives_is_waited_for",
    ),
    # Identities.
    Bug(
        "an address is welcomed again",
        "sql/42_identities.sql",
        "    if v_new = cardinality(v_identities) then\n",
        "    if true then\n",
        f"{IDENTITIES}an_address_is_welcomed_once_though_its_account_is_gone",
    ),
    Bug(
        "a guest is welcomed like everybody",
        "sql/42_identities.sql",
        "p.name = case when v_is_guest then 'guest' else 'free' end;",
        "p.name = 'free';",
        f"{IDENTITIES}a_hundred_anonymous_sign_ins_get_no_credits_as_installed",
    ),
    Bug(
        "what a guest has is given to another and stays the guest's",
        "sql/42_identities.sql",
        "      perform private.move_credits("
        "from_user_id, 'adjust', -v_rest, 'merge:' || from_user_id);\n",
        "",
        f"{IDENTITIES}a_merge_moves_all_there_is_once",
    ),
    Bug(
        "a merge is made again",
        "sql/42_identities.sql",
        "  v_is_new := private.owner_of(from_user_id) = from_user_id;\n",
        "  v_is_new := true;\n",
        f"{IDENTITIES}a_merge_moves_all_there_is_once",
    ),
    Bug(
        "a merged guest takes the files along when it is deleted",
        "sql/42_identities.sql",
        "    select p_user_id where private.owner_of(p_user_id) = p_user_id\n",
        "    select p_user_id\n",
        f"{IDENTITIES}deleting_the_merged_guest_erases_nothing_that_was_moved",
    ),
    Bug(
        "a banned user goes on",
        "sql/30_gating.sql",
        "    or e.blocked_until > now(),\n",
        "    ,\n",
        f"{IDENTITIES}a_blocked_user_asks_for_nothing_new",
    ),
    # Fencing.
    Bug(
        "an attempt is ended with any token",
        "sql/75_outcomes.sql",
        "and r.token = any (p_tokens)\n    returning r as job\n",
        "\n    returning r as job\n",
        STATES,
    ),
    Bug(
        "a job is completed with any token",
        "sql/75_outcomes.sql",
        "private.running_jobs[] := private.end_leases(p_job_ids, p_tokens);\n  v_metrics",
        "private.running_jobs[] := private.end_leases(p_job_ids, array(\n"
        "    select r.token from private.running_jobs as r where r.job_id = any (p_job_ids)\n"
        "  ));\n  v_metrics",
        STATES,
    ),
    Bug(
        "a heartbeat keeps a lease that is another's",
        "sql/70_worker.sql",
        "where r.job_id = any (p_job_ids) and r.token = any (p_tokens);",
        "where r.job_id = any (p_job_ids);",
        STATES,
    ),
    Bug(
        "a checkpoint is overwritten by who lost the lease",
        "sql/74_steps.sql",
        "and r.token = any (p_tokens) order by r.job_id for update\n  loop\n"
        "    token := v_job.token;\n    v_held := v_held || token;\n"
        "    step := private.next_step(v_job, p_answers[array_position(p_tokens, v_job.token)]);\n",
        "order by r.job_id for update\n  loop\n"
        "    token := v_job.token;\n    v_held := v_held || token;\n"
        "    step := private.next_step(v_job, p_answers[array_position(p_job_ids, v_job.job_id)]);"
        "\n",
        STATES,
    ),
    # Purchases.
    Bug(
        "a lost bucket of Storage's is the users' fault",
        "worker.py",
        'if int(said["statusCode"]) == 404 and "ucket" not in said["message"]:',
        'if int(said["statusCode"]) == 404:',
        "tests/test_worker_storage.py::test_a_source_that_is_gone_is_the_users_fault"
        "_and_a_storage_that_is_not_well_is_not",
    ),
    Bug(
        "something is bought from a source that is cut short",
        "pictures.py",
        "        raise MemoryError\n    image.load()\n    turn = turn",
        "        raise MemoryError\n    turn = turn",
        "tests/test_worker_replicate.py"
        "::test_what_is_no_picture_is_refused_at_once_and_nothing_is_bought",
    ),
    Bug(
        "a lost create is found whatever its sources were",
        "sql/74_steps.sql",
        "      else coalesce(p_job.sent_input, v_generation.provider_input)\n",
        "      else v_generation.provider_input\n",
        f"{PURCHASE}what_was_sent_with_addresses_of_sources_is_looked_for_by_them",
    ),
    Bug(
        "a lost create is found whatever its input was",
        "sql/73_answers.sql",
        "        where (private.at(item.value, v_step -> 'item_input'))[1] = p_vars -> 'input'\n",
        "        where private.at(item.value, v_step -> 'item_input') <> '{}'\n",
        f"{PURCHASE}without_proof_nothing_is_taken_over",
    ),
    Bug(
        "an answer with another's sources is this job's",
        "sql/74_steps.sql",
        "    and private.is_anothers(\n",
        "    and false and private.is_anothers(\n",
        f"{PURCHASE}what_is_no_answer_to_this_create_is_looked_for",
    ),
    Bug(
        "what cannot be looked up is bought again though nobody accepts to pay twice",
        "sql/74_steps.sql",
        "    if v_is_blind and not v_provider.buys_again then\n",
        "    if false then\n",
        f"{PURCHASE}a_create_is_told_once_and_then_looked_for_as_its_provider_can_be_asked",
    ),
    Bug(
        "a job is lost at the first look that misses it",
        "sql/74_steps.sql",
        "    or p_job.provider_job_id is not null and v_missed < 4\n",
        "    or p_job.provider_job_id is not null and v_tries < 4\n",
        f"{PURCHASE}what_ends_between_two_looks_is_not_lost",
    ),
    Bug(
        "a list of purchases is followed wherever it leads",
        "sql/74_steps.sql",
        "coalesce(substring(v_known ->> 'next' from '\\?[^#]*'), '')",
        "v_known ->> 'next'",
        f"{PURCHASE}a_list_is_read_to_its_end_and_wherever_it_leads_the_provider_is_asked",
    ),
    Bug(
        "a name that is another's is asked for",
        "sql/74_steps.sql",
        "  if v_id is not null then\n    v_values :=",
        "  if coalesce(v_id, v_known ->> 'id') is not null then\n    v_values :=",
        f"{PURCHASE}an_answer_with_anothers_name_is_asked_for_by_ours",
    ),
    Bug(
        "two jobs may have one purchase",
        "sql/12_queue_tables.sql",
        "  primary key (generation_id, provider_job_id),\n  unique (provider_job_id)\n",
        "  primary key (generation_id, provider_job_id)\n",
        "tests/test_purchase.py::test_what_a_job_has_bought_is_never_anothers",
    ),
    Bug(
        "what a deleted user's job bought runs on",
        "sql/70_worker.sql",
        "      and exists (select from public.generations as g where g.id = j.id) then 'lost'",
        "      then 'lost'",
        "tests/test_worker_replicate.py::test_a_purchase_is_stopped_where_its_user_is_deleted",
    ),
    Bug(
        "a canceled job runs on at the provider",
        "worker.py",
        "                await self._stop(running)\n            raise\n",
        "                pass\n            raise\n",
        "tests/test_worker_cancel.py"
        "::test_a_canceled_job_is_stopped_at_the_provider_within_a_second_and_paid_for",
    ),
    Bug(
        "what a worker that stops has bought is forgotten",
        "worker.py",
        'resumes = "is_asked" not in running.metrics',
        "resumes = False",
        f"{PROCESS}a_worker_that_is_stopped_finishes_what_it_can_in_time_and_claims_nothing_more",
    ),
    # Places and limits.
    Bug(
        "a job that is given back is lost",
        "sql/75_outcomes.sql",
        "    perform private.requeue_job(\n"
        "      v_job, 'released', v_job.attempt - 1, interval '0', p_resumes,\n"
        "      case when p_resumes then '{}'::jsonb else '{\"is_asked\": false}' end\n    );\n",
        "    null;\n",
        STATES,
    ),
    Bug(
        "recovery forgets what it takes",
        "sql/80_recovery.sql",
        "where r.lease_until < now() or r.deadline_at < now()\n",
        "where r.deadline_at < now()\n",
        STATES,
    ),
    Bug(
        "the limit of active jobs lets one more in",
        "sql/50_enqueue.sql",
        "where j.user_id = p_gate.user_id limit p_gate.max_active\n",
        "where j.user_id = p_gate.user_id offset 1 limit p_gate.max_active\n",
        "tests/test_gating.py::test_one_job_more_than_the_plan_allows_at_once_waits",
    ),
    # Charges and refunds.
    Bug(
        "a generation may be refunded twice",
        "sql/10_tables.sql",
        "(generation_id, bucket_id) nulls not distinct where kind = 'refund'",
        "(generation_id, bucket_id) where kind = 'refund'",
        "tests/test_credits.py::test_giving_back_twice_moves_the_balance_once",
    ),
    Bug(
        "what is given back goes into a bucket that has ended",
        "sql/40_credits.sql",
        "    if v_paid.is_over then\n",
        "    if false then\n",
        "tests/test_buckets.py"
        "::test_what_has_ended_meanwhile_is_given_back_for_a_grace_and_alone[True]",
    ),
    Bug(
        "what was spent first is given back first",
        "sql/40_credits.sql",
        "order by p.is_last desc, p.bucket_id is not null, p.id desc\n",
        "order by p.is_last, p.bucket_id is null, p.id\n",
        MODEL,
    ),
    Bug(
        "the grace can be had again and again",
        "sql/40_credits.sql",
        "      where id = v_paid.bucket_id and not is_extended;\n",
        "      where id = v_paid.bucket_id;\n",
        "tests/test_buckets.py::test_the_grace_is_given_once",
    ),
    Bug(
        "a debt is paid twice",
        "sql/40_credits.sql",
        "debt = debt + v_debt,\n",
        "debt = greatest(debt, debt + v_debt),\n",
        "tests/test_buckets.py"
        "::test_what_is_taken_and_not_there_becomes_a_debt_that_what_comes_in_pays_first",
    ),
    Bug(
        "credits can be spent in the instant of their end",
        "sql/30_gating.sql",
        "v_gate.credits_end_at <= now()",
        "v_gate.credits_end_at < now()",
        "tests/test_buckets.py::test_credits_cannot_be_spent_in_the_instant_of_their_end",
    ),
    Bug(
        "the images that were made are given back",
        "sql/75_outcomes.sql",
        "p_price / p_charged * (p_charged - p_stored)",
        "p_price / p_charged * p_stored",
        STATES,
    ),
    Bug(
        "a cancel that came too late gives all back",
        "sql/75_outcomes.sql",
        "select s.running_cancel_refund_percent into v_percent from",
        "select 100 into v_percent from",
        "tests/test_cancel.py::test_once_the_provider_was_asked_the_operators_share_goes_back",
    ),
    Bug(
        "a failure gives back all, whatever its code says",
        "sql/75_outcomes.sql",
        "select e.message, e.refund_percent into",
        "select e.message, 100 into",
        "tests/test_outcomes.py::test_what_fails_gives_back_the_share_of_its_code_rounded_up"
        "[1-50-1]",
    ),
    Bug(
        "a change of what a failure gives back breaks the books of before",
        "sql/75_outcomes.sql",
        "then nullif(v_percent, 100)\n",
        "then nullif(v_percent, v_percent)\n",
        "tests/test_health.py::test_what_is_given_back_may_change_without_breaking_what_was_given",
    ),
    Bug(
        "a grant is applied at each repeat",
        "sql/40_credits.sql",
        "p_user_id, p_kind, p_amount, v_bucket_id, p_external_id => p_external_id\n",
        "p_user_id, p_kind, p_amount, v_bucket_id\n",
        MODEL,
    ),
    Bug(
        "paid users pay what free ones do",
        "sql/50_enqueue.sql",
        "then v_model.paid_price_credits",
        "then v_model.price_credits",
        MODEL,
    ),
    Bug(
        "a retry costs whatever it costs, however little the user saw",
        "sql/54_retry.sql",
        "p_retry_of => p_job_id, p_max_price => p_max_price_credits",
        "p_retry_of => p_job_id",
        "tests/test_enqueue.py::test_no_generation_costs_more_than_the_price_that_was_seen[retry]",
    ),
    Bug(
        "who saw a lower price is charged the higher",
        "sql/50_enqueue.sql",
        "      and v_price <= p_max_price is not false\n",
        "",
        "tests/test_enqueue.py::test_no_generation_costs_more_than_the_price_that_was_seen[enqueue]",
    ),
    Bug(
        "what an operator has made again is charged",
        "sql/54_retry.sql",
        "p_is_free => true",
        "p_is_free => false",
        "tests/test_retry.py"
        "::test_redrive_queues_what_failed_with_a_code_since_a_time_free_and_once",
    ),
    Bug(
        "each link of a chain of retries is redriven",
        "sql/54_retry.sql",
        "      and not exists (select from public.generations as o where o.id = g.retry_of)\n"
        "    union all\n",
        "    union\n",
        "tests/test_retry.py::test_of_a_wish_the_last_try_is_redriven_and_no_other",
    ),
    Bug(
        "what failed is redriven however dear it was",
        "sql/54_retry.sql",
        "if v_wish.price <= v_credits is not false and v_is_blocked is not true then",
        "if v_is_blocked is not true then",
        "tests/test_retry.py::test_nobody_is_given_more_than_the_credits_at_hand_would_have_bought",
    ),
    Bug(
        "what was redriven before is forgotten",
        "sql/54_retry.sql",
        "      where w.given_at >= since\n",
        "      where false\n",
        "tests/test_retry.py::test_what_fails_with_another_code_is_not_given_on_top",
    ),
    Bug(
        "a user who canceled pays for what nobody asked for",
        "sql/75_outcomes.sql",
        "@@ '$.is_asked == false || $.is_billed == false' is not true",
        "@@ '$.nothing == 1' is not true",
        "tests/test_cancel.py"
        "::test_who_canceled_pays_neither_for_our_failures_nor_for_what_nobody_bills",
    ),
    Bug(
        "a user who canceled pays for our failures",
        "sql/75_outcomes.sql",
        "  if p_code is not null then\n    select e.message",
        "  if p_status = 'failed' then\n    select e.message",
        "tests/test_cancel.py"
        "::test_who_canceled_pays_neither_for_our_failures_nor_for_what_nobody_bills",
    ),
    Bug(
        "what is burned counts against no limit",
        "sql/30_gating.sql",
        " or e.day_burned >= p.max_burned_per_day or e.debt > 0\n",
        " or e.debt > 0\n",
        "tests/test_cancel.py::test_a_user_burns_no_more_purchases_in_a_day_than_the_plan_allows",
    ),
    Bug(
        "a day has no limit",
        "sql/30_gating.sql",
        "e.day_jobs >= p.max_per_minute",
        "false and e.day_jobs >= p.max_per_minute",
        "tests/test_gating.py::test_what_is_canceled_counts_in_the_minute_and_in_the_day",
    ),
    Bug(
        "a double tap on retry buys twice",
        "sql/54_retry.sql",
        "  if found then\n    return private.known_answer(",
        "  if false then\n    return private.known_answer(",
        "tests/test_retry.py::test_a_double_tap_buys_once",
    ),
    Bug(
        "the key of a batch is not looked at",
        "sql/52_batch.sql",
        "where user_id = v_user_id and idempotency_key = p_idempotency_key;",
        "where false;",
        "tests/test_batch.py::test_the_same_key_and_request_answer_with_the_same_batch",
    ),
    # Attempts.
    Bug(
        "a failed attempt does not count",
        "sql/75_outcomes.sql",
        "p_job.attempt - case when v_error.uses_attempt then 0 else 1 end;",
        "p_job.attempt - 1;",
        MODEL,
    ),
    Bug(
        "a job whose user wants it no more is tried again",
        "sql/75_outcomes.sql",
        "  if p_job.cancel_requested then\n",
        "  if false then\n",
        "tests/test_cancel.py"
        "::test_who_canceled_pays_neither_for_our_failures_nor_for_what_nobody_bills",
    ),
    Bug(
        "a job fails for being stuck when its worker is dead",
        "sql/80_recovery.sql",
        "    if v_job.lease_until < now() then",
        "    if v_job.deadline_at >= now() then",
        "tests/test_recovery.py"
        "::test_after_an_outage_a_job_past_its_deadline_is_resumed_not_failed",
    ),
    # Locks.
    Bug(
        "a cancel locks the balance before the job",
        "sql/77_cancel.sql",
        "  perform private.cancel_jobs(v_user_id, array[p_job_id]);",
        "  perform from public.entitlements where user_id = v_user_id for update;\n"
        "  perform private.cancel_jobs(v_user_id, array[p_job_id]);",
        CIRCLE,
    ),
    Bug(
        "a heartbeat locks jobs in any order",
        "sql/70_worker.sql",
        "  from private.settings as s\n  where r.job_id = any (p_job_ids) and",
        "  from private.settings as s, unnest(p_job_ids) as j\n  where r.job_id = j and",
        CIRCLE,
    ),
    Bug(
        "recovery waits for jobs that are being ended",
        "sql/80_recovery.sql",
        "      for update skip locked\n    );\n    perform private.put_off",
        "      for update\n    );\n    perform private.put_off",
        CIRCLE,
    ),
    Bug(
        "a user is deleted without locking what retention locks first",
        "sql/84_erasure.sql",
        "  perform from public.generations where user_id = old.user_id order by id for update;\n",
        "",
        f"{RETENTION}deleting_a_user_is_no_deadlock_with_retention",
    ),
    Bug(
        "a user is deleted without locking what their live jobs lock first",
        "sql/84_erasure.sql",
        "create trigger darkroom_lock_jobs\nbefore delete on auth.users\n"
        "for each row execute function private.lock_jobs_of_deleted_user();\n",
        "",
        CIRCLE,
    ),
    # Routines over many users.
    Bug(
        "one bad row ends a routine",
        "sql/17_health_tables.sql",
        "    if sqlstate ~ '^(25|42|53|57|58)' then",
        "    if true then",
        f"{BAD_ROWS}[mark_files]",
    ),
    Bug(
        "a row that was skipped is told nobody",
        "sql/88_health.sql",
        "        where r.last_at > now() - interval '1 day'\n",
        "        where r.last_at > now()\n",
        f"{BAD_ROWS}[expire_generations]",
    ),
    # What overlaps.
    Bug(
        "users who get credits back are locked in any order",
        "sql/75_outcomes.sql",
        "    order by e.user_id\n  loop",
        "    order by e.user_id desc\n  loop",
        CIRCLE,
    ),
    Bug(
        "a provider's breaker is locked after its models'",
        "sql/28_breaker.sql",
        "    perform from private.breakers where name = v_provider for update;\n"
        "    perform from private.breakers where name = v_route for update;\n",
        "    perform from private.breakers where name = v_route for update;\n"
        "    perform from private.breakers where name = v_provider for update;\n",
        CIRCLE,
    ),
    Bug(
        "a cancel misses a job that goes back into the queue",
        "sql/77_cancel.sql",
        "for v_look in 1 .. 5 loop",
        "for v_look in 1 .. 1 loop",
        MODEL,
    ),
    Bug(
        "what a batch costs is taken for one of its jobs",
        "sql/50_enqueue.sql",
        "      credits = e.credits - v_price * v_jobs,\n",
        "      credits = e.credits - v_price,\n",
        MODEL,
    ),
    # A worker that dies or freezes.
    Bug(
        "who was frozen buys without looking whether the job is still its own",
        "worker.py",
        "            elif time.monotonic() - running.held_at > CREATE_WITHIN_SECONDS:\n",
        "            elif False:\n",
        f"{EACH_CALL}[frozen-answers are lost]",
    ),
    Bug(
        "what a dead worker bought is not looked for",
        "sql/74_steps.sql",
        "  elsif v_step is null and p_job.create_started_at < p_job.claimed_at and (\n",
        "  elsif v_step is null and false and (\n",
        f"{PURCHASE}the_next_attempt_resumes_and_looks_for_only_what_may_be_alive",
    ),
    Bug(
        "what was bought is not saved at once",
        "sql/74_steps.sql",
        "  update private.running_jobs set provider_job_id = p_id, handles = p_handles\n"
        "  where job_id = p_job.job_id;\n",
        "  perform p_handles;\n",
        f"{PURCHASE}the_next_attempt_resumes_and_looks_for_only_what_may_be_alive",
    ),
    Bug(
        "what was bought is forgotten where the account is refused",
        "sql/74_steps.sql",
        "'may_have_bought', v_step <> 'create',",
        "'may_have_bought', false,",
        f"{PURCHASE}a_refusal_is_the_accounts_or_the_jobs_and_forgets_no_purchase",
    ),
    # Books and backups.
    Bug(
        "fewer images than were charged are no broken book",
        "sql/86_books.sql",
        "  else coalesce(l.amount, 0) <> private.refund_due(",
        "  else false and coalesce(l.amount, 0) <> private.refund_due(",
        "tests/test_health.py::test_a_fault_in_the_books_is_found_and_raises_an_alert",
    ),
    Bug(
        "a restored database gives out tokens that are out",
        "docs/RUNBOOK.md",
        "select setval('private.lease_tokens', last_value + 1000000)",
        "select last_value",
        "tests/test_backup.py::test_a_worker_that_survives_the_restore_is_fenced",
    ),
    Bug(
        "after a restore nobody looks for what was bought since the dump",
        "docs/RUNBOOK.md",
        "greatest(queued_at, now() - interval '1 hour')",
        "null",
        "tests/test_backup.py::test_workers_buy_after_a_restore_only_what_was_never_bought",
    ),
]
WAKE_UP = [
    Bug(
        "an enqueue waits for a worker that beats",
        "sql/50_enqueue.sql",
        "w.seen_at desc limit p_at_most for update of w skip locked",
        "w.seen_at desc limit p_at_most for update of w",
        "tests/test_wakeup.py"
        "::test_a_job_that_met_the_worker_while_it_beat_is_found_by_the_look_after_the_beat",
    ),
    Bug(
        "a worker waits without a last look",
        "worker.py",
        "        if not await self._claim():\n            await self._pause(self.wake, self",
        "        if True:\n            await self._pause(self.wake, self",
        f"{LOOKS}[second]",
    ),
    Bug(
        "a worker that has gone to sleep does not look at once",
        "worker.py",
        "        if await self._claim():\n            return\n        await self._pause",
        "        await self._pause",
        f"{LOOKS}[first]",
    ),
    Bug(
        "a worker that has stopped is still woken",
        "worker.py",
        'await self.db.call("unregister_worker", self.worker_id)',
        "pass",
        f"{PROCESS}a_worker_that_is_stopped_finishes_what_it_can_in_time_and_claims_nothing_more",
    ),
]
WAITED_OUT = (
    "tests/test_worker_recovery.py::test_whatever_the_server_says_of_itself_is_waited_out[25006]"
)
OUTAGE = [
    Bug(
        "trouble with the database is one class of exceptions",
        "worker.py",
        """            except psycopg.Error:
                self._tell_systemd()
                self.wake.clear()""",
        """            except psycopg.OperationalError:
                self._tell_systemd()
                self.wake.clear()""",
        WAITED_OUT,
    ),
    Bug(
        "a job fails for what the server says of itself",
        "worker.py",
        """        return "job" if state[:2] in JOBS_FAULT else""",
        """        if not isinstance(error, psycopg.OperationalError):
            return "job"
        return "job" if state[:2] in JOBS_FAULT else""",
        WAITED_OUT,
    ),
    Bug(
        "a worker that hangs says where, and hangs on",
        "worker.py",
        "dump_traceback_later(self.settings.watchdog_seconds, exit=True)",
        "dump_traceback_later(self.settings.watchdog_seconds, exit=False)",
        "tests/test_worker_systemd.py::test_where_no_systemd_does_it_ends_itself_and_only_then",
    ),
    Bug(
        "a job whose lease is lost is released",
        "worker.py",
        "        if running.is_lost:\n            log.warning",
        "        if False:\n            log.warning",
        "tests/test_worker_recovery.py"
        "::test_a_beat_that_finds_the_lease_lost_drops_the_job_and_frees_its_slot",
    ),
    Bug(
        "what was sent is forgotten with the connection",
        "outbox.py",
        "            (row,) = await self.db.insist(\n",
        "            (row,) = await self.db.call(\n",
        "tests/test_worker_webhooks.py::test_lost_connections_make_nothing_be_sent_twice",
    ),
    Bug(
        "the end of a job is told nobody",
        "sql/96_webhooks.sql",
        "when (old.status is distinct from new.status and new.finished_at is not null)",
        "when (old.finished_at is not null)",
        "tests/test_outbox.py::test_an_end_is_told_in_the_words_of_get_job_status[failed]",
    ),
    Bug(
        "what is deleted stays shared",
        "sql/95_gallery.sql",
        "when (old.deleted_at is null and new.deleted_at is not null)",
        "when (old.deleted_at is not null)",
        "tests/test_gallery.py::test_a_deletion_ends_every_share_and_its_return_does_not_renew_it",
    ),
    Bug(
        "a file that Storage does not know waits for ever",
        "sql/84_erasure.sql",
        "where d.is_needed is not true",
        "where not d.is_needed",
        f"{RETENTION}a_source_uploaded_again_after_it_was_marked_is_not_listed_and_a_lost_one_is",
    ),
    Bug(
        "pushes are sent as they came, whoever sends most",
        "sql/96_webhooks.sql",
        "order by t.turn, t.run_at limit p_at_most",
        "order by t.run_at limit p_at_most",
        "tests/test_outbox.py"
        "::test_users_take_turns_and_who_has_a_push_under_way_waits_for_its_end",
    ),
    Bug(
        "a target is asked again when it says, be it never",
        "sql/75_outcomes.sql",
        "greatest(0, least(coalesce(p_asked_seconds, 0), p_most_seconds))",
        "coalesce(p_asked_seconds, 0)",
        "tests/test_outbox.py::test_a_wish_of_the_target_counts_if_it_is_longer_up_to_a_day",
    ),
    Bug(
        "a delivery is finished with any token",
        "sql/96_webhooks.sql",
        "where d.id = p_delivery_id and d.token = p_token and d.state",
        "where d.id = p_delivery_id and d.state",
        "tests/test_outbox.py"
        "::test_what_dead_workers_were_sending_is_sent_under_the_same_id_and_once_it_is_never_again",
    ),
    Bug(
        "a worker of another release fails jobs",
        "worker.py",
        'raise Outdated(f"no private.{function} for worker {version()}: upgrade it") from None',
        "raise",
        "tests/test_upgrade.py"
        "::test_a_worker_of_another_release_waits_fails_no_job_and_hands_back_what_it_holds",
    ),
]
CELLS = "tests/test_worker_cells.py::test_"
ONE_WORKER = [
    Bug(
        "the slots of one worker count for each cell anew",
        "worker.py",
        "max(0, self.count - sum(jobs.values()))",
        "max(0, self.count - jobs[worker])",
        f"{CELLS}slots_are_shared_an_idle_cell_keeps_none_and_a_freed_one_goes_to_who_has_fewest",
    ),
    Bug(
        "a freed slot is whose cell asks first",
        "worker.py",
        "jobs[min(waiting, key=jobs.__getitem__)] += 1",
        "jobs[worker] += 1",
        f"{CELLS}free_slots_are_dealt_out_among_the_cells_that_wait",
    ),
    Bug(
        "a claim that hangs keeps the slots of other cells",
        "worker.py",
        "call_later(TAKE_SECONDS,",
        "call_later(math.inf,",
        f"{CELLS}a_cell_that_hangs_holds_up_no_other_though_there_is_one_slot_and_is_taken_up_again",
    ),
    Bug(
        "jobs that wait for a cell that is away keep their slots",
        "worker.py",
        "0 if each.db.is_away and each is not worker else len(",
        "len(",
        f"{CELLS}jobs_of_a_cell_that_is_away_keep_no_slot_and_end_when_it_is_back",
    ),
    Bug(
        "what nobody expects of one cell ends the worker of all",
        "worker.py",
        "if not worker.db.name:",
        "if worker:",
        f"{CELLS}a_cell_of_another_release_whose_answers_nobody_expects_is_tried_again",
    ),
    Bug(
        "a worker whose slots are full keeps a wake-up for itself",
        "worker.py",
        "        await self.db.claim_jobs(self.worker_id, 0)\n",
        "",
        f"{CELLS}a_worker_that_is_woken_while_its_slots_are_full_has_another_woken",
    ),
]
BREAKER = "tests/test_breaker.py::test_"
BLAME = [
    Bug(
        "a pause is for everybody, also where few have failed",
        "sql/28_breaker.sql",
        "between 1 and 99\n      and not p_user_id",
        "between 1 and 0\n      and not p_user_id",
        f"{BREAKER}a_pause_is_for_those_who_failed_and_a_trial_that_fails_makes_one_more",
    ),
    Bug(
        "who failed where others succeed may pause the model again and again",
        "sql/28_breaker.sql",
        "  if (v_is_closed and private.is_doubted(v_breaker, p_job.user_id))\n    or (",
        "  if (",
        f"{BREAKER}who_failed_where_another_succeeded_pauses_nobody_for_a_while",
    ),
    Bug(
        "the probe is a job of those who opened the breaker",
        "sql/72_claim.sql",
        "where (a.all_by_route or not a.has_failed) and (",
        "where (",
        f"{BREAKER}the_probe_is_a_job_of_a_user_who_has_not_failed_if_there_is_one",
    ),
    Bug(
        "any refusal is the account's",
        "sql/74_steps.sql",
        '        when v_memo @> \'{"refused": {"is_forbidden": true}}\'\n',
        '        when false and v_memo @> \'{"refused": {"is_forbidden": true}}\'\n',
        f"{PURCHASE}a_refusal_is_the_accounts_or_the_jobs_and_forgets_no_purchase",
    ),
    Bug(
        "a job is given back for ever",
        "sql/75_outcomes.sql",
        "when g.created_at < now() - s.give_up_after then s.max_attempts\n",
        "when false then 0\n",
        f"{BREAKER}a_job_that_is_given_back_again_and_again_gives_up",
    ),
    Bug(
        "retries that use no attempt are counted by nobody",
        "sql/75_outcomes.sql",
        "    and v_claims_before + 1 < v_settings.max_claims and exists (\n",
        "    and exists (\n",
        "tests/test_outcomes.py"
        "::test_what_uses_no_attempt_is_bounded_in_number_however_short_the_waits_are",
    ),
    Bug(
        "a provider that asks for no pause has its way",
        "sql/75_outcomes.sql",
        "    (1 - random() / 2) * least(s.retry_cap",
        "    (p_retry_after_seconds is null)::integer * least(s.retry_cap",
        "tests/test_outcomes.py"
        "::test_a_job_that_is_throttled_without_end_asks_few_times_a_minute_and_an_hour_long",
    ),
    Bug(
        "who has the same refused again and again pauses the model",
        "sql/28_breaker.sql",
        "  if v_is_closed and p_words = any (v_breaker.counted) then\n",
        "  if false then\n",
        f"{BREAKER}equal_words_from_one_input_of_one_user_count_once",
    ),
]
CLAIM = "tests/test_claim.py::test_"
FAILOVER = "tests/test_failover.py::test_"
FITTING = [
    Bug(
        "a worker is given a job without having the key",
        "sql/72_claim.sql",
        "          or (p.secret is not null and p.secret <> all (p_keys))\n",
        "",
        f"{CLAIM}a_job_is_for_workers_that_have_the_key_of_its_provider[-keys1-False]",
    ),
    Bug(
        "the room at a provider is counted without its lock",
        "sql/72_claim.sql",
        "    for no key update skip locked\n",
        "",
        f"{CLAIM}two_that_claim_at_once_never_take_more_than_a_provider_takes",
    ),
    Bug(
        "a place that was left free at a provider wakes nobody",
        "sql/72_claim.sql",
        "  if cardinality(v_candidates) > p_at_most then\n",
        "  if false then\n",
        f"{CLAIM}who_leaves_room_at_a_provider_wakes_one_who_sleeps",
    ),
    Bug(
        "who waits for a withdrawn model is failed when the job is old",
        "sql/75_outcomes.sql",
        "  if v_error.pauses_model\n    or v_error",
        "  if v_error",
        f"{BREAKER}a_withdrawn_model_waits_with_all_its_jobs_until_it_is_mended",
    ),
    # Providers.
    Bug(
        "the key goes wherever pictures may come from",
        "worker.py",
        'self._allowed(request["url"], self.key_hosts)',
        'self._allowed(request["url"], [*self.key_hosts, *self.hosts])',
        f"{PROVIDERS}no_key_goes_where_an_answer_leads_but_to_the_providers_own_hosts[bfl]",
    ),
    Bug(
        "a create that no list can prove lost is sent again",
        "sql/74_steps.sql",
        "    if v_is_blind and not v_provider.buys_again then\n",
        "    if v_provider.lost_create = 'unknown' and not v_provider.buys_again then\n",
        f"{PROVIDERS}what_becomes_of_a_job_is_what_its_provider_means[lost on the way there]",
    ),
    Bug(
        "what an attempt before had bought is taken for what was lost",
        "sql/74_steps.sql",
        "  if not found and p_id is distinct from p_job.provider_job_id then\n",
        "  if not found and not exists (\n    select from private.purchases as b"
        " where (b.generation_id, b.provider_job_id) = (p_job.job_id, p_id)\n  ) then\n",
        f"{PROVIDERS}what_an_attempt_before_had_bought_is_not_taken_for_what_was_lost[fal]",
    ),
    Bug(
        "what is moderated after it was made is waited for",
        "sql/93_recipes.sql",
        ', "Content Moderated": "moderated"',
        "",
        "tests/test_providers.py::test_an_answer_means_what_the_provider_says"
        "[BFL moderates what it made]",
    ),
]
ROUTES = [
    Bug(
        "what may have been bought is bought again by another route",
        "sql/72_claim.sql",
        " and (w.is_own or coalesce(r.provider_job_id, r.create_started_at::text) is null)\n"
        "              and not r",
        "\n              and not r",
        f"{FAILOVER}what_may_have_bought_something_stays_where_it_did",
    ),
    Bug(
        "the next route goes on from what another provider made",
        "sql/75_outcomes.sql",
        "    v_resumes := false;\n",
        "",
        f"{FAILOVER}what_the_next_route_does_anew_is_paid_at_both",
    ),
    Bug(
        "each route is booked at what the first costs",
        "sql/75_outcomes.sql",
        "w.place = j.route\n  where j.token",
        "w.place = 0\n  where j.token",
        f"{FAILOVER}what_the_next_route_does_anew_is_paid_at_both",
    ),
    Bug(
        "failures by one route pause all that a model has",
        "sql/28_breaker.sql",
        "where b.name in (w.provider, w.breaker) or b.times_opened = 0;",
        "where true;",
        f"{FAILOVER}where_a_route_is_shut_the_next_is_taken_in_fair_order_until_it_opens"
        "[it is paused itself]",
    ),
]
BILLING = "tests/test_billing.py::test_"
STORY = f"{BILLING}whatever_order_events_come_in_and_how_often_they_end_the_same"
EVENTS = [
    Bug(
        "a renewal that is told under two ids is granted twice",
        "sql/41_billing.sql",
        "      v_provider, v_sale.purchase, v_user_id, v_product.product_id,\n",
        "      v_provider, v_event_id, v_user_id, v_product.product_id,\n",
        f"{STORY}[one renewal under three ids]",
    ),
    Bug(
        "the event that comes last says until when a plan is paid",
        "sql/41_billing.sql",
        "      and (n.at, coalesce(n.paid_until, '-infinity'))\n"
        "        > (s.happened_at, coalesce(s.paid_until, '-infinity'));\n",
        "      ;\n",
        f"{STORY}[the end of a plan]",
    ),
    Bug(
        "the call that comes last says until when a user is paid",
        "sql/41_billing.sql",
        "    where (excluded.happened_at, coalesce(excluded.paid_until, '-infinity'))\n"
        "      > (s.happened_at, coalesce(s.paid_until, '-infinity'));\n",
        "    ;\n",
        f"{BILLING}of_what_is_said_of_different_times_the_latest_holds_in_whatever_order",
    ),
    Bug(
        "a proration grants a period",
        "sql/41_billing.sql",
        "      when v_sale.is_change and not v_product.grants_changes then 0\n",
        "",
        f"{STORY}[a change of plans]",
    ),
    Bug(
        "a refund that comes before its purchase takes nothing",
        "sql/41_billing.sql",
        "      where e.waits_for && v_known and",
        "      where false and",
        f"{STORY}[a refund in part]",
    ),
    Bug(
        "all that is left rolls over",
        "sql/41_billing.sql",
        "least(v_left, coalesce(v_of.next_cap - v_on, v_left))",
        "v_left",
        f"{STORY}[months that roll over]",
    ),
    Bug(
        "what rolls over is taken out of the period that has not ended",
        "sql/41_billing.sql",
        "      v_left := v_left - ((v_into ->> v_of.next)::integer - v_on);\n",
        "      v_left := 0;\n",
        f"{BILLING}a_renewal_that_is_paid_early_takes_nothing_away[price_rolling-60-1]",
    ),
    Bug(
        "a base rolls over into an add-on",
        "sql/41_billing.sql",
        "      order by o.product_id <> p.product_id, o.starts_at",
        "      order by o.starts_at",
        f"{STORY}[two products of a subscription]",
    ),
    Bug(
        "what somebody erased had bought makes the next with the same id paid",
        "sql/41_billing.sql",
        "      where p.purchase = t.purchase and p.provider = v_provider\n    )\n    union\n",
        "      where false\n    )\n    union\n",
        f"{BILLING}what_an_erased_user_bought_is_not_granted_again_to_whoever_has_the_same_id",
    ),
    Bug(
        "a sandbox's purchase is real",
        "sql/41_billing.sql",
        "      case when v_said.is_test and not v_takes_tests then 'ignored' else 'waiting' end,\n",
        "      'waiting',\n",
        f"{BILLING}a_sandbox_gives_nothing_unless_the_operator_says_so",
    ),
]
BUDGETS = [
    Bug(
        "a budget is passed by two claims at once",
        "sql/29_budgets.sql",
        "    order by s.budget_id for update of s\n",
        "    order by s.budget_id\n",
        "tests/test_budgets.py::test_concurrent_claims_never_buy_more_than_a_budget_holds",
    ),
    Bug(
        "what a dead worker bought is forgotten by the budget until it is resumed",
        "sql/75_outcomes.sql",
        "    case when p_resumes then p_job.reserved_usd end,",
        "    null::numeric,",
        "tests/test_budgets.py::"
        "test_what_it_cost_is_booked_or_all_that_was_reserved_and_the_rest_given_back[dead worker]",
    ),
    Bug(
        "an unknown cost is none",
        "sql/29_budgets.sql",
        "        coalesce(a.cost_usd, j.reserved_usd, 0) as usd\n",
        "        coalesce(a.cost_usd, 0) as usd\n",
        "tests/test_budgets.py::"
        "test_what_it_cost_is_booked_or_all_that_was_reserved_and_the_rest_given_back"
        "[for an unknown price]",
    ),
    Bug(
        "workers are woken before budgets are booked, and wait for each other with claims",
        "sql/75_outcomes.sql",
        "  perform private.book_costs(v_jobs);\n"
        "  perform private.note_failures(v_jobs);\n  perform private.wake_for(v_jobs);\n",
        "  perform private.wake_for(v_jobs);\n"
        "  perform private.book_costs(v_jobs);\n  perform private.note_failures(v_jobs);\n",
        "tests/test_locks.py::test_nobody_can_wait_in_a_circle",
    ),
]

PLANTED = [
    *SECURITY,
    *MONEY,
    *EVENTS,
    *BUDGETS,
    *WAKE_UP,
    *OUTAGE,
    *ONE_WORKER,
    *BLAME,
    *FITTING,
    *ROUTES,
]

# What may never go unnoticed, and the bug that takes it away.
CORNERSTONES = {
    "fencing": "an attempt is ended with any token",
    "the refund's key": "a generation may be refunded twice",
    "the policy": "a policy lets users read everybody's generations",
    "the list of hosts": "outputs are fetched from any host",
    "the order of locks": "a cancel locks the balance before the job",
    "the last look before sleep": "a worker waits without a last look",
}
