-- The entry: PostgREST stands before it, and every function of the API is a door here that asks a
-- cell, by PL/Proxy. It holds no state but a copy of the directory: there may be several.
--
-- A call is a transaction of its own in the cell, so `Prefer: tx=rollback` takes nothing back.
-- Where a cell does not answer, its users are told 503 unavailable; whether their call was done is
-- not known, and idempotency keys are for that.

create extension if not exists plproxy with schema cells;

do $$
begin
  if to_regrole('anon') is null then
    create role anon nologin noinherit;
    create role authenticated nologin noinherit;
    create role service_role nologin noinherit bypassrls;
    create role darkroom_monitor nologin noinherit;
    create role authenticator login noinherit;
  end if;
end;
$$;
-- A little longer than the cells', which then say themselves what took long.
alter role anon set statement_timeout = '9s';
alter role authenticated set statement_timeout = '9s';
grant anon, authenticated, service_role, darkroom_monitor to authenticator;

create table if not exists cells.routes (
  function text primary key,
  goes_to text not null,
  users text[],
  merge text,
  elsewhere text,
  call text,
  constraint routes_goes_to_is_known check (goes_to in ('user', 'event', 'home', 'first', 'all')),
  constraint routes_merge_is_of_all check ((merge is not null) = (goes_to = 'all'))
);

comment on table cells.routes is
  'Where each function of the API is done. user: where the user lives. event: where the user or the '
  'payment of a billing event is known. home: what is kept there and sent to all. first: in the '
  'first of all that answers and finds it. all: in all that answer, and the function merge makes '
  'one answer of theirs.';
comment on column cells.routes.users is
  'Arguments that name users, if it is not the user of the token: it is done where the first lives, '
  'after the others have been moved there.';
comment on column cells.routes.elsewhere is
  'What all cells are to execute, of a user who may not be theirs, if the user''s own finds nothing.';
comment on column cells.routes.call is 'What the cell is to execute: see make_doors.';

-- Rows of the app's own functions stay.
insert into cells.routes (function, goes_to, users, merge)
select f.name, r.goes_to, r.users::text[], r.merge
from (values
  (
    'user', null, null,
    'cancel_batch,cancel_generation,delete_generation,delete_prompt_template,enqueue_batch,'
    'enqueue_generation,get_batch_status,get_entitlement,get_job_status,like_image,'
    'list_active_jobs,list_generations,list_prompt_templates,register_push_token,'
    'restore_generation,retry_generation,save_prompt_template,set_favorite,set_tags,share_image,'
    'unregister_push_token'
  ),
  ('user', '{user_id}', null, 'export_user,grant_credits,set_paid'),
  ('user', '{to_user_id,from_user_id}', null, 'merge_user'),
  ('event', null, null, 'apply_billing_event'),
  ('home', null, null, 'delete_webhook,enable_webhook,register_webhook,rotate_webhook_secret'),
  ('first', null, null, 'list_models,ping,queue_job,redeliver'),
  ('all', null, 'by_time', 'list_deliveries'),
  ('all', null, 'done', 'pause_model,resume_model'),
  ('all', null, 'pages', 'list_public_images'),
  (
    'all', null, 'sums',
    'list_webhooks,queue_health,queue_history,queue_report,redeliver_dead,redrive_failed'
  )
) as r (goes_to, users, merge, names)
cross join string_to_table(r.names, ',') as f (name)
on conflict (function) do update
set goes_to = excluded.goes_to, users = excluded.users, merge = excluded.merge;

update cells.routes set elsewhere =
  'select private.like_shared_image(r.job_id, r.image_position, r.is_liked)'
  ' from jsonb_to_record($1) as r (job_id uuid, image_position integer, is_liked boolean)'
where function = 'like_image';

-- The wire.

create function cells.send(
  address text, user_id uuid, role text, claims text, method text, is_read_only boolean, call text,
  arguments jsonb, out lives_in text, out answer json, out headers text
)
language plproxy as $$
  connect address;
  select * from cells.answer(
    user_id, role, claims, method, is_read_only, call, arguments
  );
$$;

create function cells.list_functions(
  address text, out name text, out arguments text, out answer_type text, out volatility text,
  out call text, out names text[], out roles text[], out description text
)
returns setof record language plproxy as $$
  connect address;
  select * from cells.list_functions();
$$;

-- Asks one cell, with the request's role and claims. PL/Proxy writes its own words around what a cell
-- says; an error of the API is raised as the cell did. Says is_away where the cell did not answer.
-- As darkroom_entry it asks what no request may, of schema cells.
create function cells.ask(
  p_cell text, p_user_id uuid, p_call text, p_arguments jsonb,
  p_role text default current_setting('role'),
  out lives_in text, out answer json, out is_away boolean
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_address text := (select coalesce(c.pooler, c.address) from cells.cells as c where c.name = p_cell);
  v_headers text;
  v_said text;
  v_detail text;
  v_hint text;
begin
  if v_address is null then  -- a user who is just moving
    is_away := true;
    return;
  end if;
  select s.lives_in, s.answer, s.headers into lives_in, answer, v_headers
  from cells.send(
    v_address, p_user_id, p_role, current_setting('request.jwt.claims', true),
    current_setting('request.method', true), current_setting('transaction_read_only') = 'on',
    p_call, p_arguments
  ) as s;
  perform set_config('response.headers', v_headers, true) where v_headers <> '';
exception when others or query_canceled then
  get stacked diagnostics
    v_said = message_text, v_detail = pg_exception_detail, v_hint = pg_exception_hint;
  if v_said !~ '^[\w.]+\(\d+\): \[[^]]*\] REMOTE ERROR: ' or sqlstate ~ '^(08|53300|57P)' then
    raise log 'cell % is away: % %', p_cell, sqlstate, v_said;
    is_away := true;
    return;
  end if;
  v_said := regexp_replace(v_said, '^.*? REMOTE ERROR: ', '');
  v_detail := regexp_replace(v_detail, '^Remote detail: ', '');
  v_hint := regexp_replace(v_hint, '^Remote hint: ', '');
  if v_hint <> '' then
    raise exception using errcode = sqlstate, message = v_said, detail = v_detail, hint = v_hint;
  elsif v_detail <> '' then
    raise exception using errcode = sqlstate, message = v_said, detail = v_detail;
  end if;
  raise exception using errcode = sqlstate, message = v_said;
end;
$$;

-- Asks where a user lives. Who has no row in the directory is asked for in home, which answers where
-- a user lives whose row has not come here yet.
--
-- Raises: PT503 unavailable, and what the cell raises.
create function cells.ask_of(
  p_user_id uuid, p_call text, p_arguments jsonb, p_cell text default null
) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_asked record;
  v_cell text := coalesce(
    p_cell, (select u.cell from cells.users as u where u.user_id = p_user_id), 'home'
  );
begin
  for v_hop in 1 .. 3 loop
    v_asked := cells.ask(v_cell, p_user_id, p_call, p_arguments);
    exit when v_asked.is_away;
    if v_asked.lives_in is null then
      return v_asked.answer;
    end if;
    v_cell := v_asked.lives_in;
  end loop;
  perform cells.refuse_unavailable();
end;
$$;

-- Asks all cells or, for the first, one after the other until one finds it.
--
-- Raises: PT503 unavailable, and what a cell raises.
create function cells.ask_all(
  p_call text, p_arguments jsonb, p_is_for_first boolean default false,
  p_role text default current_setting('role'),
  out cells text[], out answers json[], out away text[]
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_cell text;
  v_is_last boolean;
  v_asked record;
begin
  cells := '{}';
  answers := '{}';
  away := '{}';
  for v_cell, v_is_last in
    select c.name, row_number() over () = count(*) over ()
    from (
      select o.name from cells.cells as o
      order by case when p_is_for_first then random() end, o.name <> 'home', o.name
    ) as c
  loop
    begin
      v_asked := cells.ask(v_cell, null, p_call, p_arguments, p_role);
      if v_asked.is_away then
        away := away || v_cell;
        continue;
      end if;
      cells := cells || v_cell;
      answers := answers || v_asked.answer;
      exit when p_is_for_first;
      if v_asked.answer ->> 'redriven' is not null then  -- as many as are asked for, of all
        p_arguments := p_arguments || jsonb_build_object(
          'at_most', (p_arguments ->> 'at_most')::integer - (v_asked.answer ->> 'redriven')::integer
        );
        exit when p_arguments ->> 'at_most' = '0';
      end if;
    exception when sqlstate 'PT404' then
      if not p_is_for_first or v_is_last and away = '{}' then
        raise;
      end if;
    end;
  end loop;
  if answers = '{}' then
    perform cells.refuse_unavailable();
  end if;
end;
$$;

-- Has a user live where another does. While a job of the user runs that is for later.
create function cells.bring(p_user_id uuid, p_to_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_users jsonb := jsonb_build_object('user_id', p_user_id, 'to_id', p_to_id);
  v_moved record;
begin
  v_moved := cells.ask(
    'home', null, 'select cells.bring(r.user_id, r.to_id)'
    ' from jsonb_to_record($1) as r (user_id uuid, to_id uuid)', v_users, 'darkroom_entry'
  );
  if v_moved.answer ->> 'state' = 'moved' then
    v_moved := cells.ask(
      'home', null, 'select to_json(true) from jsonb_to_record($1) as r (user_id uuid, cell text)'
      ' cross join cells.end_move(r.user_id)', v_users || v_moved.answer::jsonb,
      'darkroom_entry'
    );
  end if;
  if v_moved.is_away or v_moved.answer ->> 'state' <> 'moved' then
    perform cells.refuse_unavailable();
  end if;
end;
$$;

-- Applies a billing event where it is known, best of all as one that came already, then by the first
-- of its names that is somebody's, then by its payment. What nobody knows waits in home, until what
-- it waits for has come to a cell: then home hands it over, now or with the event that brought it,
-- whichever comes last.
--
-- Whom cells that are away know is not asked if the best name is known: it is nobody's there.
create function cells.apply_event(p_call text, p_arguments jsonb) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_asked record;
  v_known record;
  v_answer json;
begin
  loop
    v_asked := cells.ask_all(
      'select to_json(k) from cells.know_event($1 ->> ''provider'', $1 -> ''event'') as k',
      p_arguments, false, 'darkroom_entry'
    );
    select
      k.place, k.user_id, k.keys, a.cell,
      array(
        select l.id from unnest(v_asked.answers) as o (answer)
        cross join jsonb_to_record(o.answer::jsonb) as m (leaving uuid[])
        cross join unnest(m.leaving) as l (id)
      ) as leaving,
      k.leaving is not null as is_transfer
    into v_known
    from unnest(v_asked.answers, v_asked.cells) as a (answer, cell)
    cross join json_to_record(a.answer) as k (place integer, user_id uuid, keys text[], leaving uuid[])
    order by k.place nulls last, a.cell <> 'home' limit 1;
    if v_asked.away <> '{}' and ((v_known.place > 1) is not false or v_known.is_transfer) then
      perform cells.refuse_unavailable();
    end if;
    v_known.cell := case when v_known.place is null then 'home' else v_known.cell end;
    exit when v_answer is not null;
    perform cells.bring(l.id, v_known.user_id) from unnest(v_known.leaving) as l (id)
    where l.id <> v_known.user_id;
    v_answer := cells.ask_of(v_known.user_id, p_call, p_arguments, v_known.cell);
    exit when v_known.cell <> 'home' or v_answer ->> 'outcome' <> 'waiting';
  end loop;
  if v_known.cell <> 'home' then
    v_asked := cells.ask(
      'home', null, 'select to_json(cells.hand_over(r.cell, r.user_id, r.keys))'
      ' from jsonb_to_record($1) as r (cell text, user_id uuid, keys text[])', to_jsonb(v_known),
      'darkroom_entry'
    );
    if v_asked.is_away then
      perform cells.refuse_unavailable();
    end if;
  end if;
  return v_answer;
end;
$$;

-- Where each call goes.
--
-- Raises: PT400 invalid_input, PT503 unavailable, and what the cell raises.
create function cells.call(p_function text, p_arguments jsonb) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_route cells.routes := (select r from cells.routes as r where r.function = p_function);
  v_users uuid[];
  v_asked record;
  v_answer json;
begin
  perform cells.refuse_long_numbers(p_arguments) where pg_column_size(p_arguments) > 500;
  if v_route.goes_to = 'event' then
    return cells.apply_event(v_route.call, p_arguments);
  elsif v_route.goes_to in ('user', 'home') then
    begin
      v_users := case
        when v_route.users is not null
          then array(select (p_arguments ->> u.name)::uuid from unnest(v_route.users) as u (name))
        when v_route.goes_to = 'user' then array[
          (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
        ]
      end;
    exception when data_exception then
      null;  -- for the cell to refuse
    end;
    perform cells.bring(v_users[2], v_users[1]) where v_users[2] <> v_users[1];
    if v_route.elsewhere is null then
      return cells.ask_of(v_users[1], v_route.call, p_arguments);
    end if;
    begin
      return cells.ask_of(v_users[1], v_route.call, p_arguments);
    exception when sqlstate 'PT404' then
      v_route.goes_to := 'first';
    end;
  end if;
  v_asked := cells.ask_all(
    coalesce(v_route.elsewhere, v_route.call), p_arguments, v_route.goes_to = 'first',
    case when v_route.elsewhere is null then current_setting('role') else 'darkroom_entry' end
  );
  if v_route.goes_to = 'first' then
    return v_asked.answers[1];
  end if;
  execute format('select cells.merge_%s($1, $2, $3)', v_route.merge) into v_answer
  using v_asked.answers, p_arguments, v_asked.away;
  return v_answer;
end;
$$;

create function cells.refuse_unavailable() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  raise sqlstate 'PGRST' using
    message = json_build_object(
      'code', 'PT503', 'message', 'unavailable',
      'details', 'The database of this account does not answer at the moment.',
      'hint', 'Try again in 10 seconds.'
    )::text,
    detail = json_build_object('status', 503, 'headers', '{"Retry-After": "10"}'::json)::text;
end;
$$;

-- Numbers of which the text is longer than what was sent, 1e131071 say, are not sent on: see
-- read_request (30).
create function cells.refuse_long_numbers(p_arguments jsonb) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_name text := (
    select a.key from jsonb_each(p_arguments) as a
    where exists (
      select from jsonb_path_query(a.value, 'strict $.** ? (@.type() == "number")') as n (value)
      where abs(n.value::numeric) >= 1e400 or scale(n.value::numeric) > 400
    )
    limit 1
  );
begin
  if v_name is not null then
    raise sqlstate 'PT400' using
      message = 'invalid_input', detail = v_name || ': a number of more than 400 digits',
      hint = 'Correct the argument and call again.';
  end if;
end;
$$;

-- One answer of many.

-- What was shared last comes first, whoever has it.
create function cells.merge_pages(p_answers json[], p_arguments jsonb, p_away text[]) returns json
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'images', coalesce(json_agg(p.image order by p.image ->> 'share_id' desc), '[]'),
    'next_before', case count(*) when (p_arguments ->> 'page_size')::integer
      then min(p.image ->> 'share_id') end
  )
  from (
    select i.image
    from unnest(p_answers) as a (answer)
    cross join json_array_elements(a.answer -> 'images') as i (image)
    order by i.image ->> 'share_id' desc limit (p_arguments ->> 'page_size')::integer
  ) as p
$$;

create function cells.merge_by_time(p_answers json[], p_arguments jsonb, p_away text[]) returns json
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(d.delivery), '[]')
  from (
    select i.delivery
    from unnest(p_answers) as a (answer)
    cross join json_array_elements(a.answer) as i (delivery)
    order by i.delivery ->> 'delivery_id' desc limit (p_arguments ->> 'at_most')::integer
  ) as d
$$;

-- What all cells were to do.
create function cells.merge_done(p_answers json[], p_arguments jsonb, p_away text[]) returns json
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform cells.refuse_unavailable() where p_away <> '{}';
  return p_answers[1];
end;
$$;

-- Numbers are added up. Of times, ages, percentiles, shares and limits the greatest counts, of times
-- since when something is well the least, and the error rate is that of all attempts. Lists of what
-- has a name of its own have each name once, others come one after the other.
create function cells.add(p_name text, p_one jsonb, p_other jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := jsonb_typeof(p_one);
begin
  if coalesce(p_one, 'null') = 'null' or coalesce(p_other, 'null') = 'null' then
    return coalesce(nullif(p_one, 'null'), p_other);
  elsif v_type = 'object' then
    return (
      select jsonb_object_agg(k.name, case k.name
        when 'error_rate' then (
          select to_jsonb(round(sum(r.error_rate * r.attempts_of_15_minutes) / nullif(
            sum(r.attempts_of_15_minutes) filter (where r.error_rate is not null), 0
          ), 4))
          from (values (p_one), (p_other)) as o (rates)
          cross join jsonb_to_record(o.rates) as r (
            error_rate numeric, attempts_of_15_minutes numeric
          )
        )
        else cells.add(k.name, p_one -> k.name, p_other -> k.name)
      end)
      from jsonb_object_keys(p_one || p_other) as k (name)
    );
  elsif v_type = 'array' and p_name in (
    '', 'alerts', 'budgets', 'errors', 'models', 'paused', 'queue'
  ) then
    return (
      select coalesce(jsonb_agg(cells.add('', a.value, b.value) order by coalesce(a.key, b.key)), '[]')
      from (
        select cells.key_of(e.value) as key, e.value from jsonb_array_elements(p_one) as e
      ) as a
      full join (
        select cells.key_of(e.value) as key, e.value from jsonb_array_elements(p_other) as e
      ) as b on a.key = b.key
    );
  elsif v_type = 'array' then
    return case when p_one = p_other then p_one else p_one || p_other end;
  elsif v_type = 'number' and p_name not in (
    'bucket_seconds', 'every_seconds', 'limit_usd', 'mean_seconds', 'oldest_pending_seconds',
    'oldest_ready_seconds', 'oldest_transactions', 'p50_seconds', 'p95_seconds', 'runs_missed',
    'stale_seconds', 'threshold', 'took_ms', 'used', 'value', 'waited_seconds'
  ) then
    return to_jsonb((p_one #>> '{}')::numeric + (p_other #>> '{}')::numeric);
  elsif p_name in ('checked_at', 'last_run_at', 'sees_all_sessions', 'since') then
    return least(p_one, p_other);
  elsif p_name in ('status', 'severity') then  -- critical, warning, ok
    return case when p_one < p_other and p_one <> '"ok"' or p_other = '"ok"' then p_one
      else p_other end;
  elsif p_name = 'detail' and p_one <> p_other then
    return to_jsonb(concat(p_one #>> '{}', '; ', p_other #>> '{}'));
  end if;
  return greatest(p_one, p_other);
end;
$$;

-- What tells the elements of a list apart.
create function cells.key_of(p_element jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_agg(p_element -> k)
  from unnest(
    '{at,alert,model_id,error_code,kind,name,webhook_id,scope,period,limit_usd,on_breach}'::text[]
  ) as k
  where p_element ->> 'scope' is distinct from 'a user'  -- one of many, who are not named
$$;

create function cells.merge_sums(p_answers json[], p_arguments jsonb, p_away text[]) returns json
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_away jsonb := jsonb_build_object('status', 'critical', 'cells_away', p_away);
  v_total jsonb;
  v_answer json;
begin
  foreach v_answer in array p_answers loop
    v_total := cells.add('', v_total, v_answer::jsonb);
  end loop;
  if p_away <> '{}' and v_total ? 'health' then
    v_total := cells.add('', v_total, jsonb_build_object('health', v_away));
  elsif p_away <> '{}' and jsonb_typeof(v_total) = 'object' then
    v_total := cells.add('', v_total, case when v_total ? 'status' then v_away
      else v_away - 'status' end);
  end if;
  return v_total;
end;
$$;

-- The doors, like those of a cell that has no functions but Darkroom's. To be called again when the
-- cells have a new release: one of its functions that is not in routes is refused here.
create function cells.make_doors(p_like text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $do$
declare
  v record;
  v_door text;
begin
  execute (
    select coalesce(string_agg(format('drop function %s', p.oid::regprocedure), ';'), '')
    from pg_proc as p where p.pronamespace = 'public'::regnamespace
  );
  for v in
    select f.* from cells.cells as c cross join cells.list_functions(c.address) as f
    where c.name = p_like
  loop
    update cells.routes as r set call = v.call where r.function = v.name;
    if not found then
      raise exception 'cells.routes says not where % goes', v.name;
    end if;
    v_door := format('public.%I(%s)', v.name, v.arguments);
    execute format(
      'create function %s returns %s language plpgsql %s'
      ' set search_path = pg_catalog, pg_temp as %L',
      v_door, v.answer_type, v.volatility,
      format('begin return cells.call(%L, jsonb_build_object(%s)); end', v.name, (
        select string_agg(format('%L, $%s', n.name, n.place), ', ' order by n.place)
        from unnest(v.names) with ordinality as n (name, place)
      ))
    );
    v_door := format('function public.%I', v.name);
    execute format('comment on %s is %L', v_door, v.description);
    execute format('revoke all on %s from public', v_door);
    execute format('grant execute on %s to %s', v_door, array_to_string(v.roles, ', '));
  end loop;
  notify pgrst, 'reload schema';
end;
$do$;

-- The tables that users read: one partition in each cell, of which a user's request meets one. Whether
-- a cell is away concerns its users only, for PostgreSQL leaves out the other partitions before it
-- connects. The policies are the cells' own.

create extension if not exists postgres_fdw with schema cells;
create schema if not exists private;

create or replace function private.caller_id() returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub';
exception when data_exception then
  return null;
end;
$$;

create function cells.caller_cell() returns text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce((select u.cell from cells.users as u where u.user_id = private.caller_id()), 'home')
$$;

create function cells.list_tables(
  address text, out name text, out columns text[], out types text[], out policy text,
  out description text
)
returns setof record language plproxy as $$
  connect address;
  select * from cells.list_tables();
$$;

-- What is right already stays as it is, for users read it meanwhile.
create function cells.make_tables(p_like text) returns void
language plpgsql set search_path = public as $do$
declare
  v_cell cells.cells;
  v record;
  v_is text;
begin
  execute (
    select coalesce(
      string_agg(format('drop server %I cascade; drop schema %1$I', s.srvname), ';'), ''
    )
    from pg_foreign_server as s
    where not exists (select from cells.cells as c where c.name = s.srvname)
  );
  for v_cell in select * from cells.cells loop
    perform cells.make_server(v_cell.name, v_cell.address, '-c darkroom.cell=' || v_cell.name);
    execute format('create schema if not exists %I', v_cell.name);
  end loop;
  for v in
    select t.* from cells.cells as c cross join cells.list_tables(c.address) as t
    where c.name = p_like
  loop
    v_is := md5(v.columns::text || v.types::text);
    if obj_description(to_regclass('cells.' || quote_ident(v.name))) is distinct from v_is then
      execute format('drop table if exists cells.%I cascade', v.name);
      execute format(
        'create table cells.%I (cell text, %s) partition by list (cell);'
        'alter table cells.%1$I enable row level security;'
        'comment on table cells.%1$I is %3$L;'
        'create view public.%1$I with (security_invoker = true) as select %4$s from cells.%1$I;'
        'grant select on cells.%1$I, public.%1$I to authenticated, service_role',
        v.name, (
          select string_agg(c.name || ' ' || c.type, ', ')
          from unnest(v.columns, v.types) as c (name, type)
        ), v_is, array_to_string(v.columns, ', ')
      );
    end if;
    execute (
      select coalesce(string_agg(format(
        'create foreign table %I.%I partition of cells.%2$I for values in (%1$L) server %1$I'
        ' options (schema_name ''cells'')', c.name, v.name
      ), ';'), '')
      from cells.cells as c
      where to_regclass(format('%I.%I', c.name, v.name)) is null
    );
    execute format(
      'comment on view public.%I is %L;'
      'drop policy if exists "As in the cell" on cells.%1$I;'
      'create policy "As in the cell" on cells.%1$I for select to authenticated'
      ' using (cell = cells.caller_cell() and %3$s)', v.name, v.description, v.policy
    );
  end loop;
  notify pgrst, 'reload schema';
end;
$do$;

revoke all on all routines in schema cells from public;
grant usage on schema cells, private to anon, authenticated, service_role, darkroom_monitor;
grant execute on function cells.caller_cell to authenticated;
grant execute on function cells.call to anon, authenticated, service_role, darkroom_monitor;
