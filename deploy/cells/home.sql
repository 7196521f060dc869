-- What home has beside cell.sql: Auth and Storage are here, and so is the directory.
--
-- A new user is given a cell, and what Auth changes is told to the user's cell. A cell that is away
-- holds up no sign-up: follow_changed_user (42) notes the user, and retention tries again.

create extension if not exists dblink with schema cells;
revoke all on all functions in schema cells from public;

-- Before the trigger that makes the entitlement (42), by its name. Whoever was here before there were
-- cells stays.
create function cells.assign_cell() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  insert into cells.users (user_id, cell)
  select new.id, chosen.name
  from (
    select c.name from cells.cells as c
    where c.weight > 0 order by -ln(1 - random()) / c.weight limit 1
  ) as chosen
  where chosen.name <> 'home';
  return null;
end;
$$;

create trigger darkroom_assign_cell after insert on auth.users
for each row execute function cells.assign_cell();

create function cells.tell(p_cell text, p_statement text) returns void
language sql set search_path = pg_catalog, pg_temp as $$
  select from cells.dblink(
    (select c.address from cells.cells as c where c.name = p_cell), p_statement
  ) as answer (nothing text)
$$;

alter function private.follow_user rename to follow_own_user;

-- An address is welcomed once in all cells. That cells are told: addresses themselves stay here.
create function private.follow_user(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_cell text := (select u.cell from cells.users as u where u.user_id = p_user_id);
  v_user jsonb := (select to_jsonb(u) from auth.users as u where u.id = p_user_id);
  v_identities bytea[] := private.identities_of(v_user);
  v_new integer;
begin
  if v_user is null then
    perform cells.tell(
      c.name, format('select cells.drop_user(%1$L) from cells.forget_guest(%1$L)', p_user_id)
    )
    from cells.cells as c where c.name <> 'home';
    perform cells.forget_guest(p_user_id);
    delete from cells.users where user_id = p_user_id;
  elsif v_cell is null then
    perform private.follow_own_user(p_user_id);
  else
    insert into private.welcomed_identities (identity)
    select i.identity from private.settings as s cross join unnest(v_identities) as i (identity)
    where s.welcome_once_per_identity
    on conflict (identity) do nothing;
    get diagnostics v_new = row_count;
    perform cells.tell(v_cell, format('select cells.put_user(%L)', (
      select jsonb_object_agg(k, v_user -> k)
      from unnest('{id,is_anonymous,banned_until,deleted_at}'::text[]) as k
    ) || jsonb_build_object(
      'is_welcome', v_new = cardinality(v_identities) or not s.welcome_once_per_identity
    )))
    from private.settings as s;
  end if;
end;
$$;

create function cells.follow_deleted_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.follow_user(old.id);
  return null;
exception when others then
  perform private.note_skipped('follow_user', old.id::text, sqlstate, sqlerrm);
  return null;
end;
$$;

create trigger darkroom_follow_deleted_user after delete on auth.users
for each row execute function cells.follow_deleted_user();

-- Moves a user in two halves, a transaction each: call move_user again until it says moved, also after
-- a crash. Waits for what runs are the caller's: it answers running.
create function cells.start_move(p_user_id uuid, p_cell text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_from text := coalesce((select u.cell from cells.users as u where u.user_id = p_user_id), 'home');
  v_package jsonb;
begin
  if v_from = 'moving' then
    v_from := 'home';
  end if;
  if v_from <> p_cell then
    select a.package into v_package from cells.dblink(
      (select c.address from cells.cells as c where c.name = v_from),
      format('select cells.pack_user(%L)', p_user_id)
    ) as a (package jsonb);
    if v_package is null then
      return 'running';
    end if;
    perform cells.tell(p_cell, format('select cells.unpack_user(%L)', v_package));
    insert into cells.users as u (user_id, cell) values (p_user_id, p_cell)
    on conflict (user_id) do update set cell = excluded.cell;
    delete from cells.users where user_id = p_user_id and p_cell = 'home';
  end if;
  return 'moved';
end;
$$;

create function cells.end_move(p_user_id uuid, p_cell text) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_cell text;
begin
  if p_cell <> 'home' then
    perform private.follow_user(p_user_id);
  end if;
  for v_cell in select c.name from cells.cells as c where c.name <> p_cell loop
    perform cells.tell(v_cell, format('select cells.leave_user(%L, %L)', p_user_id, p_cell));
    if v_cell <> 'home' then
      perform cells.tell(v_cell, format('select cells.drop_user(%L)', p_user_id));
    end if;
  end loop;
end;
$$;

create procedure cells.move_user(p_user_id uuid, p_cell text, inout state text default null)
language plpgsql as $$
begin
  state := cells.start_move(p_user_id, p_cell);
  commit;
  perform cells.end_move(p_user_id, p_cell) where state = 'moved';
end;
$$;

-- Has a user live where another does, as far as start_move. Null: they do, or one of them is nobody.
create function cells.bring(p_user_id uuid, p_to_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_cells text[] := array(
    select coalesce(u.cell, case when e.user_id is not null then 'home' end)
    from unnest(array[p_user_id, p_to_id]) with ordinality as i (id, place)
    left join cells.users as u on u.user_id = i.id
    left join public.entitlements as e on e.user_id = i.id
    order by i.place
  );
begin
  if v_cells[1] <> v_cells[2] then
    return json_build_object('cell', v_cells[2], 'state', case
      when 'moving' = any (v_cells) then 'moving' else cells.start_move(p_user_id, v_cells[2])
    end);
  end if;
  return null;
end;
$$;

-- Billing events of users and payments that nobody knows wait here.

-- Hands to a cell what waits for what this user has there. The cell has it before it is gone here,
-- and takes it once.
create function cells.hand_over(p_cell text, p_user_id uuid, p_keys text[]) returns integer
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_event private.billing_events;
  v_done integer := 0;
begin
  for v_event in
    delete from private.billing_events as e where e.waits_for && p_keys and e.outcome = 'waiting'
    returning e.*
  loop
    perform cells.tell(p_cell, format('select cells.take_event(%L, %L)', p_user_id, to_jsonb(v_event)));
    v_done := v_done + 1;
  end loop;
  return v_done;
end;
$$;

-- A step of retention (85): of users who have signed up since.
create function private.hand_over_events(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, coalesce(sum(cells.hand_over(u.cell, u.user_id, array[w.key])), 0)::integer
  from private.billing_events as e
  cross join unnest(e.waits_for) as w (key)
  inner join cells.users as u on u.user_id = case
    when w.key ~* '^user .*:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then right(w.key, 36)::uuid
  end
  where e.outcome = 'waiting' and u.cell in (select c.name from cells.cells as c)
$$;

insert into private.retention_walks (name) values ('hand_over_events') on conflict do nothing;

revoke all on procedure cells.move_user from public;
revoke all on function private.follow_user, private.hand_over_events from public;
revoke all on function
cells.assign_cell, cells.bring, cells.end_move, cells.follow_deleted_user, cells.hand_over,
cells.start_move, cells.tell
from public;
grant execute on function cells.bring, cells.end_move, cells.hand_over to darkroom_entry;

-- Everybody reads the files of what is shared, wherever its owner lives: see the policy (95).
create or replace view private.shared_paths as
select i.storage_path as path from public.images as i where i.share_id is not null
union all
select i.preview_path from public.images as i where i.share_id is not null
union all
select s.path from cells.shared_paths as s;

-- Cells read which files there are.
grant usage on schema storage to darkroom_entry;
grant select on storage.objects to darkroom_entry;
create policy "Cells know which files there are" on storage.objects
for select to darkroom_entry using (bucket_id in ('generations', 'inputs'));

create publication darkroom_directory for table cells.cells, cells.users;
create publication darkroom_catalogue for table
private.providers, public.models, private.model_routes, public.model_aliases, private.error_codes,
private.provider_words, private.plans, private.settings, private.alert_rules,
private.billing_providers, public.credit_products, private.push_texts, private.webhook_endpoints,
-- The app's, not its users': what goes is told by all of a row.
public.prompt_templates where (user_id is null);
alter table public.prompt_templates replica identity full;
