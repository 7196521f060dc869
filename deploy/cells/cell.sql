-- What every cell has beside sql/, home among them.
--
-- The entry logs in as darkroom_entry, which has no right but to become one of the API's roles, as
-- PostgREST's authenticator does. It says who asks; PostgREST before the entry has checked the token.

grant anon, authenticated, service_role, darkroom_monitor to darkroom_entry;

-- A request as PostgREST makes it: role, claims, method, and read only for GET. Of a user who lives
-- elsewhere it answers where, and does nothing.
create function cells.answer(
  p_user_id uuid, p_role text, p_claims text, p_method text, p_is_read_only boolean,
  p_call text, p_arguments jsonb, out lives_in text, out answer json, out headers text
)
language plpgsql as $$
begin
  perform pg_advisory_xact_lock_shared(hashtextextended(p_user_id::text, 0));  -- see pack_user
  select u.cell into lives_in from cells.users as u where u.user_id = p_user_id;
  if found then
    return;
  end if;
  perform
    set_config('request.jwt.claims', p_claims, true), set_config('request.method', p_method, true),
    case when p_is_read_only then set_config('transaction_read_only', 'on', true) end,
    set_config('role', p_role, true);
  execute p_call into answer using p_arguments;
  headers := current_setting('response.headers', true);
end;
$$;

-- The API, for the entry to make its doors of: what PostgREST's roles may call.
create function cells.list_functions()
returns table (
  name text, arguments text, answer_type text, volatility text, call text, names text[],
  roles text[], description text
)
language sql stable as $$
  select
    p.proname, pg_get_function_arguments(p.oid), pg_get_function_result(p.oid),
    case p.provolatile when 'v' then 'volatile' else 'stable' end,
    case when p.pronargs = 0 then format('select public.%I()', p.proname) else format(
      'select public.%I(%s) from jsonb_to_record($1) as r (%s)', p.proname,
      string_agg(format('%I => r.%1$I', a.name), ', ') filter (where a.name is not null),
      string_agg(format('%I %s', a.name, format_type(a.type, null)), ', ')
        filter (where a.name is not null)
    ) end,
    coalesce(p.proargnames, '{}'),
    array(
      select r.name
      from unnest('{anon,authenticated,service_role,darkroom_monitor}'::text[]) as r (name)
      where has_function_privilege(r.name, p.oid, 'execute')
    ),
    obj_description(p.oid)
  from pg_proc as p
  left join unnest(p.proargnames, p.proargtypes::oid[]) as a (name, type) on true
  where p.pronamespace = 'public'::regnamespace
    and p.prorettype = 'json'::regtype
    and not exists (
      select from pg_depend as d where d.objid = p.oid and d.deptype = 'e'
    )
  group by p.oid
$$;

-- The tables that users read, all rows of them: the entry has the same policies. The entry says how
-- it calls the cell when it connects.
do $$
begin
  execute (
    select string_agg(format(
      'create view cells.%I as select current_setting(''darkroom.cell'') as cell, t.*'
      ' from public.%1$I as t; grant select on cells.%1$I to darkroom_entry', c.relname
    ), ';')
    from pg_class as c
    where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p')
      and has_table_privilege('authenticated', c.oid, 'select') and c.relrowsecurity
  );
end;
$$;

create function cells.list_tables()
returns table (name text, columns text[], types text[], policy text, description text)
language sql stable as $$
  select
    c.relname, array_agg(quote_ident(a.attname) order by a.attnum),
    array_agg(format_type(coalesce(nullif(t.typbasetype, 0), t.oid), null) order by a.attnum),
    pg_get_expr(p.polqual, c.oid), obj_description(c.oid)
  from pg_class as v
  inner join pg_class as c on c.relname = v.relname and c.relnamespace = 'public'::regnamespace
  inner join pg_policy as p
    on p.polrelid = c.oid and to_regrole('authenticated')::oid = any (p.polroles)
  inner join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
  inner join pg_type as t on t.oid = a.atttypid
  where v.relnamespace = 'cells'::regnamespace and v.relkind = 'v'
  group by c.oid, c.relname, p.polqual
  order by c.oid
$$;

-- What share.sql divides over the cells. unit: what it is handed out in, of a budget the dearest
-- job that it holds. wanted: what this cell has use for. Users' own budgets are where the user is.
create view cells.limits as
select
  'provider ' || p.name as name, p.max_running::numeric as whole, 1::numeric as unit,
  p.part::numeric as part, coalesce(j.running, 0) as used,
  least(coalesce(j.jobs, 0), p.max_running) as wanted
from private.providers as p
left join (
  select w.provider, count(*) as jobs, count(q.is_running) as running
  from (
    select model_id, route, true as is_running from private.running_jobs
    union all
    select model_id, route, null from private.ready_jobs
  ) as q
  inner join private.routes as w on w.model_id = q.model_id and w.place = q.route
  group by w.provider
) as j on j.provider = p.name
where p.max_running is not null
union all
select
  'budget ' || b.id, b.limit_usd, u.unit, b.part_usd, s.spent_usd + s.reserved_usd,
  s.spent_usd + s.reserved_usd + u.unit
from private.budgets as b
inner join private.budget_states as s on s.id = b.id
cross join lateral (
  select coalesce(max(c.least_usd), 0.000001) as unit
  from private.route_costs as c inner join public.models as m on m.id = c.model_id
  where m.is_active and c.least_usd between 0.000001 and b.limit_usd
    and coalesce(b.model_id, c.model_id) = c.model_id
    and coalesce(b.provider, c.provider) = c.provider
) as u
where b.user_id is null;

-- Home says which parts this cell has from now on, and is told what it may have of each at most:
-- more, where more runs or is spent already. Claims that are under way are waited for.
create function cells.take_parts(p_parts jsonb)
returns table (name text, part numeric, wanted numeric)
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform from private.budget_spendings as s order by s.budget_id for update;
  update private.budgets as b set part_usd = p.value::numeric from jsonb_each_text(p_parts) as p
  where p.key = 'budget ' || b.id and b.part_usd is distinct from p.value::numeric;
  update private.providers as r set part = p.value::numeric from jsonb_each_text(p_parts) as p
  where p.key = 'provider ' || r.name and r.part is distinct from p.value::numeric;
  return query
  select l.name, greatest(coalesce(l.part, l.whole), l.used), l.wanted from cells.limits as l;
end;
$$;

-- What users of other cells leave here, and what the entry asks of a cell by itself.

create function cells.forget_guest(p_user_id uuid) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  delete from public.image_likes where user_id = p_user_id
$$;

-- What is known here of a billing event. place: how well, 0 if it came here already, else which of its
-- names is that of user_id, 1000 if its payment is known; null: not at all. keys: what others of its
-- names and payments may wait for. leaving: who gives away what was bought (moved_from); null: nobody.
create function cells.know_event(
  p_provider text, p_event jsonb, out place integer, out user_id uuid, out keys text[],
  out leaving uuid[]
)
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off as $$
#variable_conflict use_column
declare
  v_said private.billing_event;
  v_payments text[];
begin
  begin
    v_said := private.read_event(p_provider, p_event);
  exception
    when data_exception or integrity_constraint_violation or program_limit_exceeded
      or statement_too_complex or sqlstate 'PT400' then
      return;  -- home refuses it
  end;
  v_payments := v_said.payments;
  select k.place, k.user_id into place, user_id
  from (
    select 0 as place, e.user_id from private.billing_events as e
    where e.event_id = v_said.id and e.provider = p_provider and e.outcome <> 'waiting'
    union all
    select n.place, u.id
    from unnest(v_said.users) with ordinality as n (name, place)
    cross join private.billed_user(p_provider, array[n.name::text]) as u (id)
    where u.id is not null
    union all
    select 1000, p.user_id from private.billing_purchases as p where p.payments && v_payments
    union all  -- of users who are about to leave: they are refused, and the event is sent again
    select 0, m.user_id
    from cells.moves as m
    where m.package -> 'user_ids' ?| v_said.users
      or exists (
        select from jsonb_to_recordset(m.package -> 'private.billing_customers')
          as c (provider text, name text)
        where c.name = any (v_said.users) and c.provider = p_provider
      )
      or exists (
        select from jsonb_to_recordset(m.package -> 'private.billing_purchases')
          as p (payments text[])
        where p.payments && v_payments
      )
  ) as k
  order by k.place limit 1;
  keys := array(
    select concat('user ', p_provider, ':', n.name)
    from unnest(v_said.users || v_said.moved_from) as n (name)
    where n.name !~* '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
    union
    select 'payment ' || n.name from unnest(v_payments) as n (name)
  );
  leaving := (
    select coalesce(array_agg(u.id) filter (where u.id is not null), '{}')
    from unnest(v_said.moved_from) as n (name)
    cross join private.billed_user(p_provider, array[n.name::text]) as u (id)
    having count(*) > 0
  );
end;
$$;

-- An event that waited in home for this user.
--
-- Raises: PT503 unavailable.
create function cells.take_event(p_user_id uuid, p_event jsonb) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_event private.billing_events := jsonb_populate_record(null::private.billing_events, p_event);
begin
  perform pg_advisory_xact_lock_shared(hashtextextended(p_user_id::text, 0));  -- as in answer
  if exists (select from cells.users as u where u.user_id = p_user_id) then
    perform private.refuse('unavailable', 'The user is moving.', p_retry_after => 10);
  end if;
  insert into private.billing_events select v_event.* on conflict do nothing;
  perform private.apply_kept(v_event.provider || ' ' || v_event.event_id);
end;
$$;

-- Files of all cells are in one Storage: of those, a cell looks for left ones of its own users only.
create or replace function private.has_folder(p_folder uuid) returns boolean
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select exists (
    select from public.entitlements as e where e.user_id = private.owner_of(p_folder)
  )
$$;
grant usage on schema private to darkroom_entry;
grant execute on function private.has_folder to darkroom_entry;

-- Who has left, or is about to, is not made anew here by what Auth says.
create or replace function private.follow_elsewhere(p_user_id uuid) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform pg_advisory_xact_lock_shared(hashtextextended(p_user_id::text, 0));  -- see pack_user
  return exists (select from cells.users as u where u.user_id = p_user_id);
end;
$$;

grant select on cells.users to darkroom_entry;
grant execute on function
cells.answer, cells.forget_guest, cells.know_event, cells.list_functions, cells.list_tables,
cells.take_event, cells.take_parts,
private.like_shared_image
to darkroom_entry;
