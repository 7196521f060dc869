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
    array_remove(array_agg(a.name), null),
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

-- A cell knows its own users only, and would take the files of all others for left over.
delete from private.retention_walks where name = 'expire_orphans';

revoke all on function cells.answer, cells.list_functions, cells.list_tables, cells.take_parts
from public;
grant select on cells.users to darkroom_entry;
grant execute on function cells.answer, cells.list_functions, cells.list_tables, cells.take_parts
to darkroom_entry;
