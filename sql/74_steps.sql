-- What a worker does next for a job: one state machine for all providers.
--
-- A worker asks with what the provider answered last, or with null after the claim, and is told
-- what to send, to store, or to fail with. What it says of memo it is told again with the next
-- answer. Creating a job at the provider costs money and cannot be repeated safely, so:
--   - a claim (72) counts as the begin of a create, and a create is told to a worker once, while
--     its lease holds;
--   - the provider's id is saved in the call that brings it, before anything else is done;
--   - what a create bought whose answer was lost is looked for as the provider's lost_create says,
--     and taken over by proof only: our key, or the whole input. Where that has addresses of
--     sources, which nobody can know again, sent_input keeps it.
-- Whoever puts a provider's id into purchases has it, and nobody else ever.

-- Makes a provider's job this one's, unless it is another's or was this one's in an attempt before,
-- which came to nothing.
create function private.adopt(
  p_job private.running_jobs, p_id text, p_handles jsonb default null
) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  insert into private.purchases (generation_id, provider_job_id) values (p_job.job_id, p_id)
  on conflict do nothing;
  if not found and p_id is distinct from p_job.provider_job_id then
    return false;
  end if;
  update private.running_jobs set provider_job_id = p_id, handles = p_handles
  where job_id = p_job.job_id;
  return true;
end;
$$;

-- Whether a provider repeats the input of a create with addresses that were not sent: then it
-- answers somebody else.
create function private.is_anothers(p_echo jsonb, p_input jsonb) returns boolean
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  return exists (
    select e.value
    from jsonb_path_query(
      p_echo, 'strict $.** ? (@.type() == "string" && @ like_regex "://")'
    ) as e (value)
    except
    select i.value from jsonb_path_query(p_input, 'strict $.**') as i (value)
  );
end;
$$;

-- Seconds to the next try of what failed this often before, or longer, up to a minute, if the
-- provider asks for it.
create function private.next_try(p_failures integer, p_asked_seconds double precision) returns real
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return greatest(
    least(10, 0.25 * 2 ^ least(p_failures, 16)), least(60, coalesce(p_asked_seconds, 0))
  );
end;
$$;

create function private.next_step(p_job private.running_jobs, p_answer jsonb) returns jsonb
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations;
  v_model public.models;
  v_route private.routes;
  v_provider private.providers;
  v_values jsonb;
  v_step text := p_answer ->> 'step';
  v_memo jsonb := coalesce(p_answer -> 'memo', '{}');
  v_tries integer := coalesce((p_answer #>> '{memo,tries}')::integer, 0);
  v_missed integer := coalesce((p_answer #>> '{memo,missed}')::integer, 0);
  v_is_blind boolean;  -- that a lost create is not found does not prove that nothing was bought
  v_known jsonb := '{}'::jsonb;
  v_is text;  -- as read_answer says; also ready, bought, absent
  v_send text;
  v_request jsonb;
  v_wait real := 0;
  v_id text;
begin
  select * into strict v_generation from public.generations where id = p_job.job_id;
  select * into v_model from public.models where id = p_job.model_id;
  select * into v_route from private.routes where model_id = p_job.model_id and place = p_job.route;
  select * into v_provider from private.providers where name = v_route.provider;
  if v_provider.recipe is null then
    return jsonb_build_object(
      'do', 'fail', 'code', 'internal', 'reason', 'there is no such provider any more'
    );
  end if;
  v_values := jsonb_build_object(
    'input', case
      when v_step = 'sources' then p_answer -> 'input'
      else coalesce(p_job.sent_input, v_generation.provider_input)
    end,
    'outputs_path', v_route.outputs_path,
    'count', v_generation.image_count,
    'ref', v_route.provider_ref,
    'app', substring(v_route.provider_ref from '^[^/]+/[^/]+'),
    'model', split_part(v_route.provider_ref, ':', 1),
    'version', split_part(v_route.provider_ref, ':', 2),
    'key', case when v_provider.lost_create = 'key' then md5(p_job.job_id || '/' || (
      select count(*) from private.purchases as b
      where b.generation_id = p_job.job_id
        and b.provider_job_id is distinct from p_job.provider_job_id
    ))::uuid end,
    'id', p_job.provider_job_id,
    'handles', p_job.handles,
    'deadline', greatest(5, extract(epoch from v_model.deadline)::integer),
    'since', to_char(
      (p_job.create_started_at - interval '1 minute') at time zone 'utc',
      'YYYY-MM-DD"T"HH24:MI:SS"+00:00"'
    ),
    'base', v_provider.base_url
  ) || coalesce(v_provider.recipe -> 'places', '{}');
  if v_route.input_template is not null then
    v_values := v_values || jsonb_build_object(
      'input', jsonb_strip_nulls(private.fill(v_route.input_template, v_values))
    );
  end if;
  if v_provider.lost_create = 'key' and p_job.provider_job_id is null then
    v_values := v_values || jsonb_build_object('id', v_values -> 'key');
  end if;
  v_is_blind := v_provider.recipe #> '{find,shows_all}' = 'true' is not true;

  -- What is known.
  if v_step is null and p_job.provider_job_id is not null then
    v_is := 'bought';
  elsif v_step is null and p_job.create_started_at < p_job.claimed_at and (
    p_job.sent_input is not null
    or not v_is_blind and not v_generation.provider_input ?| v_model.image_inputs
  ) then
    v_is := 'unsure';
  elsif v_step is null or v_step = 'sources' then
    v_is := 'ready';
  else
    v_known := private.read_answer(
      v_provider.name, v_step, (p_answer ->> 'status')::integer, p_answer -> 'headers',
      p_answer -> 'body', v_values
    );
    v_is := v_known ->> 'is';
    if v_step = 'poll' and v_known ->> 'id' <> v_values ->> 'id' then
      v_is := 'again';  -- the answer to another's question
      v_known := '{}';
    end if;
    v_known := v_known || jsonb_build_object(
      'reason', concat_ws(' ', v_known ->> 'reason', p_answer ->> 'error'),
      'metrics', jsonb_strip_nulls(jsonb_build_object(
        'is_asked', case when v_step = 'create' and v_is = 'failed' then false end,
        'is_billed', v_known -> 'is_billed',
        'provider_seconds', v_known -> 'seconds',
        'images', coalesce(v_known -> 'images', to_jsonb(jsonb_array_length(v_known -> 'outputs'))),
        'cost_usd', coalesce(
          v_known -> 'cost_usd', v_known #> '{handles,cost_usd}', p_job.handles -> 'cost_usd'
        )
      ))
    );
  end if;
  if v_step = 'cancel' then
    return jsonb_build_object('do', 'cancel', 'metrics', v_known -> 'metrics');
  end if;

  -- Whose refusal it is: the account's or, where that is open, this job's or its model's.
  if v_step = 'account' then
    return (v_memo -> 'refused') || jsonb_build_object(
      'is_sure', v_known ->> 'code' = 'provider_refused' is true,
      'do', case
        when v_memo @> '{"refused": {"is_forbidden": true}}'
          and v_known ->> 'code' = 'provider_refused' is not true then 'fail'
        else 'pause'
      end
    );
  elsif v_known ->> 'code' = 'provider_refused' then
    v_memo := jsonb_build_object('refused', v_known || jsonb_build_object(
      'is_forbidden', p_answer -> 'status' = '403', 'may_have_bought', v_step <> 'create',
      'is_sure', false, 'do', 'pause'
    ));
    if not v_provider.recipe ? 'account' then
      return v_memo -> 'refused';
    end if;
    v_send := 'account';
  end if;

  -- What is proven to be this job's, by its answer or by our key, becomes so.
  if v_is = 'accepted' and v_known ->> 'id' ~ '^[\w.:-]{1,200}$'
    and (v_provider.lost_create <> 'key' or v_known -> 'id' = v_values -> 'key')
    and length(v_known ->> 'handles') > 10000 is not true
    and private.is_anothers(
      (private.at(p_answer -> 'body', v_provider.recipe #> '{create,echo}'))[1], v_values -> 'input'
    ) is not true then
    v_id := v_known ->> 'id';
  elsif p_job.provider_job_id is null and v_step = 'poll' and v_is in ('running', 'done', 'failed')
    or p_job.provider_job_id is null and v_known @> '{"is_alive": true}' then
    v_id := v_values ->> 'id';
  end if;
  foreach v_id in array array_remove(
    v_id || array(select jsonb_array_elements_text(v_known -> 'ids')), null
  ) loop
    p_job.handles := coalesce(v_known -> 'handles', private.fill(
      v_provider.recipe #> '{find,handles}', v_values || jsonb_build_object('id', v_id)
    ));
    exit when private.adopt(p_job, v_id, p_job.handles);
    v_id := null;
  end loop;
  if v_id is not null then
    v_values := v_values || jsonb_build_object('id', v_id, 'handles', p_job.handles);
    p_job.provider_job_id := v_id;
  end if;
  if v_is = 'accepted' and v_id is null then
    v_is := 'unsure';
    v_known := v_known || '{"reason": "create: an answer without an id of its own"}';
  elsif v_is = 'found' then
    v_is := case
      when v_id is not null or v_known @> '{"is_alive": true}' then 'running'
      else 'missing'
    end;
  end if;

  -- What was not answered, and what is not found.
  if v_is = 'unsure' and v_provider.lost_create <> 'unknown' then
    v_send := case v_provider.lost_create when 'key' then 'poll' else 'find' end;
    v_memo := jsonb_strip_nulls(jsonb_build_object(
      'until', clock_timestamp() + v_provider.settle, 'lost', v_known -> 'reason'
    ));
  elsif v_is = 'missing' and v_known ->> 'next' <> '' then
    v_send := 'find';
    v_memo := v_memo || jsonb_build_object(
      'page', coalesce(substring(v_known ->> 'next' from '\?[^#]*'), ''),
      'pages', coalesce((v_memo ->> 'pages')::integer, 1) + 1
    );
    if v_memo @@ '$.pages > 50' then
      return v_known || '{"do": "fail", "code": "timeout", "reason": "find: too many pages"}';
    end if;
  elsif v_is = 'missing' and v_step <> 'find' and v_provider.recipe #> '{find,alive}' <> 'null' then
    v_send := 'find';
  elsif v_is = 'missing' and (
    p_job.provider_job_id is null and clock_timestamp() < (v_memo ->> 'until')::timestamptz
    or p_job.provider_job_id is not null and v_missed < 4
  ) then
    v_send := case v_provider.lost_create when 'key' then 'poll' else v_step end;
    v_wait := private.next_try(v_missed, null);
    v_memo := v_memo - '{page,pages}'::text[] || jsonb_build_object('missed', v_missed + 1);
  elsif v_is = 'unsure' or v_is = 'missing' and p_job.provider_job_id is null then
    if v_is_blind and not v_provider.buys_again then
      return v_known || jsonb_build_object(
        'do', 'fail', 'code', 'outcome_unknown', 'reason', coalesce(
          v_memo ->> 'lost', nullif(v_known ->> 'reason', ''), 'create: began in an attempt before'
        )
      );
    elsif v_step = 'create' or v_memo ? 'lost' then
      return v_known || jsonb_build_object(
        'do', 'fail', 'code', 'provider_timeout',
        'reason', coalesce(v_memo ->> 'lost', v_known ->> 'reason')
      );
    end if;
    v_is := 'ready';
  end if;

  -- What comes next.
  if v_is = 'done' and v_known ? 'outputs' then
    update private.running_jobs set stage = 'storing' where job_id = p_job.job_id;
    return v_known - 'logs' || case
      when p_job.cancel_requested then '{"do": "cancel"}'::jsonb
      when v_known -> 'outputs' = '[]'
        then '{"do": "fail", "code": "provider_error", "reason": "no output"}'
      else '{"do": "store"}'
    end;
  elsif v_is = 'failed' and v_send is null then
    return v_known - 'logs' || '{"do": "fail"}';
  elsif v_is = 'gone' or v_is = 'missing' and v_send is null then
    return v_known || jsonb_build_object(
      'do', 'fail', 'code', 'result_lost', 'reason', v_step || ': its result was removed'
    );
  elsif v_is = 'done' then
    v_send := 'result';
  elsif v_is = 'again' then
    v_send := v_step;
    v_wait := private.next_try(v_tries, (v_known ->> 'retry_after')::double precision);
    v_memo := v_memo || jsonb_build_object('tries', v_tries + 1);
  elsif v_is in ('bought', 'accepted', 'running') then
    v_send := 'poll';
    v_wait := case v_is
      when 'accepted' then 0.5
      when 'running' then least(3, 0.5 * 1.2 ^ least(v_tries, 20))
      else 0
    end;
    v_memo := jsonb_build_object('tries', v_tries + 1);
  end if;
  if v_send = 'upload' or v_is = 'ready' and v_step is distinct from 'sources'
    and v_generation.provider_input ?| v_model.image_inputs then
    return jsonb_build_object(
      'do', 'sources', 'wait', v_wait, 'memo', v_memo,
      'upload',
      (v_provider.recipe -> 'upload') || private.build_request(v_provider.name, 'upload', v_values)
    );
  elsif v_is = 'ready' then
    v_send := 'create';
    if v_step = 'sources' or v_is_blind then
      update private.running_jobs
      set sent_input = coalesce(p_answer -> 'input', v_generation.provider_input)
      where job_id = p_job.job_id;
    end if;
  end if;
  v_request := private.build_request(v_provider.name, v_send, v_values);
  return jsonb_build_object(
    'do', 'send', 'step', v_send, 'wait', v_wait, 'memo', v_memo,
    'request', case
      when v_send = 'find' and v_memo ? 'page' then v_request || jsonb_build_object(
        'url', split_part(v_request ->> 'url', '?', 1) || (v_memo ->> 'page')
      )
      else v_request
    end,
    'is_found', case when v_step = 'find' and v_id is not null then true end,
    'cancel', case
      when v_send = 'poll' and v_step is distinct from 'poll'
        then jsonb_path_query_array(
          private.build_request(v_provider.name, 'cancel', v_values), '$[*]'
        )
    end,
    'percent', coalesce(
      v_known -> 'percent',
      to_jsonb(private.percent_in(v_known ->> 'logs', v_generation.image_count))
    ),
    'metrics', case when v_step = 'create' then v_known -> 'metrics' end
  );
end;
$$;

create function private.next_steps(p_job_ids uuid[], p_tokens bigint[], p_answers jsonb[])
returns table (token bigint, step jsonb)
language plpgsql security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
#variable_conflict use_column
declare
  v_job private.running_jobs;
  v_held bigint[] := array[]::bigint[];
begin
  for v_job in
    select r.* from private.running_jobs as r
    where r.job_id = any (p_job_ids) and r.token = any (p_tokens) order by r.job_id for update
  loop
    token := v_job.token;
    v_held := v_held || token;
    step := private.next_step(v_job, p_answers[array_position(p_tokens, v_job.token)]);
    return next;
  end loop;
  -- The user was deleted while the create was under way: nobody else stops what it bought.
  return query
  select said.token, jsonb_build_object('do', 'drop', 'cancel', jsonb_path_query_array(
    private.build_request(said.answer ->> 'provider', 'cancel', known.to_cancel), '$[*]'
  ))
  from unnest(p_job_ids, p_tokens, p_answers) as said (job_id, token, answer)
  cross join lateral (
    select private.read_answer(
      said.answer ->> 'provider', 'create', (said.answer ->> 'status')::integer,
      said.answer -> 'headers', said.answer -> 'body'
    ) as to_cancel
  ) as known
  where said.answer ->> 'step' = 'create' and said.token <> all (v_held)
    and known.to_cancel ->> 'is' = 'accepted'
    and not exists (select from public.generations as g where g.id = said.job_id);
end;
$$;

comment on function private.next_steps is
  'What to do next for each of these jobs, after what the provider answered: {step, memo as it '
  'was told, provider, status (0: nothing was sent, null: no answer came), headers, body, '
  'error}; null after the claim; {step: sources, input}: the input with addresses in place of '
  'paths. Answers each job whose lease holds {do, …}: send (request, after wait seconds; '
  'cancel: what stops the job from now on); sources (make their addresses, with upload where '
  'Storage''s own cannot be fetched); store (outputs); fail (code, reason, detail, '
  'retry_after); pause (the account is refused); cancel (its user wants that); drop (its user '
  'is gone: send cancel). metrics are as complete_jobs takes them.';

create function private.list_providers() returns table (
  name text, base_url text, secret text, key_hosts text[], hosts text[], account jsonb
)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select
    p.name, p.base_url, p.secret, p.key_hosts, p.hosts,
    private.build_request(p.name, 'account', '{}')
  from private.providers as p
  where p.recipe is not null and p.is_active and exists (
    select from private.routes as w inner join public.models as m on m.id = w.model_id
    where w.provider = p.name and m.is_active
  )
  order by p.name
$$;

comment on function private.list_providers is
  'The providers of active models, and what to ask to see whether the account is open.';
