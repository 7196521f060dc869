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
  argument text,
  merge text,
  call text,
  constraint routes_goes_to_is_known check (
    goes_to in ('user', 'argument', 'home', 'any', 'every', 'all', 'first')
  ),
  constraint routes_argument_is_of_argument check ((argument is not null) = (goes_to = 'argument')),
  constraint routes_merge_is_of_all check ((merge is not null) = (goes_to = 'all'))
);

comment on table cells.routes is
  'Where each function of the API is done. user: where the user of the token lives. argument: where '
  'the user lives whom the argument names. home: what is kept there and sent to all. any: whichever '
  'answers. every: in all of them, or it is refused. first: in the first that finds it. all: in '
  'all that answer, and the function merge makes one answer of theirs.';
comment on column cells.routes.call is 'What the cell is to execute: see make_doors.';

truncate cells.routes;
insert into cells.routes (function, goes_to, argument, merge) values
('cancel_batch', 'user', null, null),
('cancel_generation', 'user', null, null),
('delete_generation', 'user', null, null),
('delete_prompt_template', 'user', null, null),
('enqueue_batch', 'user', null, null),
('enqueue_generation', 'user', null, null),
('get_batch_status', 'user', null, null),
('get_entitlement', 'user', null, null),
('get_job_status', 'user', null, null),
('list_active_jobs', 'user', null, null),
('list_generations', 'user', null, null),
('list_prompt_templates', 'user', null, null),
('register_push_token', 'user', null, null),
('restore_generation', 'user', null, null),
('retry_generation', 'user', null, null),
('save_prompt_template', 'user', null, null),
('set_favorite', 'user', null, null),
('set_tags', 'user', null, null),
('share_image', 'user', null, null),
('unregister_push_token', 'user', null, null),
('like_image', 'user', null, null),  -- of the user's own cell only, as yet
('export_user', 'argument', 'user_id', null),
('grant_credits', 'argument', 'user_id', null),
('set_paid', 'argument', 'user_id', null),
('merge_user', 'argument', 'to_user_id', null),  -- both of one cell, as yet
('apply_billing_event', 'home', null, null),  -- users of home only, as yet
('delete_webhook', 'home', null, null),
('enable_webhook', 'home', null, null),
('list_webhooks', 'home', null, null),
('register_webhook', 'home', null, null),
('rotate_webhook_secret', 'home', null, null),
('list_models', 'any', null, null),
('ping', 'any', null, null),
('pause_model', 'every', null, null),
('resume_model', 'every', null, null),
('queue_job', 'first', null, null),
('redeliver', 'first', null, null),
('list_deliveries', 'all', null, 'by_time'),
('list_public_images', 'all', null, 'pages'),
('queue_health', 'all', null, 'sums'),
('queue_history', 'all', null, 'sums'),
('queue_report', 'all', null, 'sums'),
('redeliver_dead', 'all', null, 'sums'),
('redrive_failed', 'all', null, 'sums');

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
create function cells.ask(
  p_cell text, p_user_id uuid, p_call text, p_arguments jsonb,
  out lives_in text, out answer json, out is_away boolean
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_address text := (select c.address from cells.cells as c where c.name = p_cell);
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
    v_address, p_user_id, current_setting('role'), current_setting('request.jwt.claims', true),
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

-- Where each call goes. Who has no row in the directory is asked for in home, which answers where a
-- user lives whose row has not come here yet.
--
-- Raises: PT503 unavailable, and what the cell raises.
create function cells.call(p_function text, p_arguments jsonb) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_route cells.routes := (select r from cells.routes as r where r.function = p_function);
  v_user_id uuid;
  v_cell text := 'home';
  v_is_last boolean;
  v_asked record;
  v_answers json[] := '{}';
  v_away text[] := '{}';
  v_answer json;
begin
  if v_route.goes_to in ('user', 'argument', 'home') then
    begin
      v_user_id := case v_route.goes_to
        when 'user' then nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
        when 'argument' then p_arguments ->> v_route.argument
      end;
    exception when data_exception then
      null;  -- for the cell to refuse
    end;
    select u.cell into v_cell from cells.users as u where u.user_id = v_user_id;
    v_asked := cells.ask(coalesce(v_cell, 'home'), v_user_id, v_route.call, p_arguments);
    if v_asked.lives_in is not null then
      v_asked := cells.ask(v_asked.lives_in, v_user_id, v_route.call, p_arguments);
    end if;
    if v_asked.is_away then
      perform cells.refuse_unavailable();
    end if;
    return v_asked.answer;
  end if;
  for v_cell, v_is_last in
    select c.name, row_number() over () = count(*) over ()
    from (
      select name from cells.cells
      order by case v_route.goes_to when 'any' then random() end, name <> 'home', name
    ) as c
  loop
    begin
      v_asked := cells.ask(v_cell, null, v_route.call, p_arguments);
      if v_asked.is_away then
        v_away := v_away || v_cell;
      elsif v_route.goes_to in ('any', 'first') then
        return v_asked.answer;
      else
        v_answers := v_answers || v_asked.answer;
      end if;
    exception when sqlstate 'PT404' then
      if v_route.goes_to <> 'first' or v_is_last and v_away = '{}' then
        raise;
      end if;
    end;
  end loop;
  if cardinality(v_answers) = 0 or v_route.goes_to = 'every' and v_away <> '{}' then
    perform cells.refuse_unavailable();
  elsif v_route.goes_to = 'every' then
    return v_answers[1];
  end if;
  execute format('select cells.merge_%s($1, $2, $3)', v_route.merge) into v_answer
  using v_answers, p_arguments, v_away;
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

-- Numbers are added up, but for times, shares and limits, of which the greatest counts. What is
-- listed is listed together; alerts, models, errors and times of the same name are one.
create function cells.add(p_name text, p_one jsonb, p_other jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := jsonb_typeof(p_one);
begin
  if coalesce(p_one, 'null') = 'null' or coalesce(p_other, 'null') = 'null' then
    return coalesce(nullif(p_one, 'null'), p_other);
  elsif v_type = 'object' then
    return (
      select jsonb_object_agg(k.name, cells.add(k.name, p_one -> k.name, p_other -> k.name))
      from jsonb_object_keys(p_one || p_other) as k (name)
    );
  elsif v_type = 'array' and p_name in ('alerts', 'models', 'errors', 'queue') then
    return (
      select jsonb_agg(cells.add('', a.value, b.value))
      from jsonb_array_elements(p_one) as a
      full join jsonb_array_elements(p_other) as b
        on jsonb_build_array(
          a.value -> 'alert', a.value -> 'at', a.value -> 'model_id', a.value -> 'error_code'
        ) = jsonb_build_array(
          b.value -> 'alert', b.value -> 'at', b.value -> 'model_id', b.value -> 'error_code'
        )
    );
  elsif v_type = 'array' then
    return p_one || p_other;
  elsif v_type = 'number' and p_name !~ '(seconds|oldest|rate|used|value|threshold|limit|missed|_ms$)' then
    return to_jsonb((p_one #>> '{}')::numeric + (p_other #>> '{}')::numeric);
  elsif p_name in ('status', 'severity') then  -- critical, warning, ok
    return case when p_one < p_other and p_one <> '"ok"' or p_other = '"ok"' then p_one
      else p_other end;
  end if;
  return greatest(p_one, p_other);
end;
$$;

create function cells.merge_sums(p_answers json[], p_arguments jsonb, p_away text[]) returns json
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_total jsonb;
  v_answer json;
begin
  foreach v_answer in array p_answers loop
    v_total := cells.add('', v_total, v_answer::jsonb);
  end loop;
  if p_away <> '{}' then
    v_total := v_total || jsonb_build_object('cells_away', p_away)
      || case when v_total ? 'status' then '{"status": "critical"}' else '{}' end::jsonb;
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

revoke all on all functions in schema cells from public;
grant usage on schema cells, private to anon, authenticated, service_role, darkroom_monitor;
grant execute on function cells.caller_cell to authenticated;
grant execute on function cells.call to anon, authenticated, service_role, darkroom_monitor;
