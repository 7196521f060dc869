-- What home has beside cell.sql: Auth and Storage are here, and so is the directory.
--
-- A new user is given a cell, and what Auth changes is told to the user's cell. A cell that is away
-- holds up no sign-up: follow_changed_user (42) notes the user, and retention tries again.

create extension if not exists dblink with schema cells;
revoke all on all functions in schema cells from public;

-- How the script cells connects as the owners. A number is never given again: see move.sql.
create table if not exists cells.databases (
  name text primary key,
  address text not null,
  is_entry boolean not null,
  number integer generated always as identity (maxvalue 63)
);

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
    for share  -- or the cell could be let go meanwhile
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

do $$
begin
  if to_regproc('private.follow_own_user') is null then
    alter function private.follow_user rename to follow_own_user;
  end if;
end;
$$;

create or replace function private.follow_user(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_cell text := (select u.cell from cells.users as u where u.user_id = p_user_id);
  v_user jsonb := (select to_jsonb(u) from auth.users as u where u.id = p_user_id);
begin
  if v_cell is null then
    perform private.follow_own_user(p_user_id);
  elsif v_user is null then
    perform cells.tell(v_cell, format('select cells.drop_user(%L)', p_user_id));
    delete from cells.users where user_id = p_user_id;
  else
    perform cells.tell(v_cell, format('select cells.put_user(%L)', (
      select jsonb_object_agg(k, v_user -> k)
      from unnest('{id,email,phone,is_anonymous,banned_until,deleted_at}'::text[]) as k
    )));
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

-- Moves a user, with commits between the steps: call it again until it says moved, also after a crash.
-- Waits for what runs are the caller's: it answers running.
create procedure cells.move_user(p_user_id uuid, p_cell text, inout state text default null)
language plpgsql as $$
declare
  v_from text := coalesce((select u.cell from cells.users as u where u.user_id = p_user_id), 'home');
  v_user jsonb := (select to_jsonb(u) from auth.users as u where u.id = p_user_id);
  v_package jsonb;
  v_cell text;
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
      state := 'running';
      return;
    end if;
    perform cells.tell(p_cell, format('select cells.unpack_user(%L)', v_package));
    insert into cells.users as u (user_id, cell) values (p_user_id, p_cell)
    on conflict (user_id) do update set cell = excluded.cell;
    delete from cells.users where user_id = p_user_id and p_cell = 'home';
    commit;
  end if;
  if p_cell <> 'home' then
    perform private.follow_user(p_user_id);
  end if;
  for v_cell in select c.name from cells.cells as c where c.name <> p_cell loop
    perform cells.tell(v_cell, format('select cells.leave_user(%L, %L)', p_user_id, p_cell));
    if v_cell <> 'home' then
      perform cells.tell(v_cell, format('select cells.drop_user(%L)', p_user_id));
    end if;
  end loop;
  state := 'moved';
end;
$$;

revoke all on procedure cells.move_user from public;
revoke all on function private.follow_user from public;
revoke all on function cells.assign_cell, cells.tell, cells.follow_deleted_user from public;

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
drop policy if exists "Cells know which files there are" on storage.objects;
create policy "Cells know which files there are" on storage.objects
for select to darkroom_entry using (bucket_id in ('generations', 'inputs'));

drop publication if exists darkroom_directory, darkroom_catalogue;
create publication darkroom_directory for table cells.cells, cells.users;
create publication darkroom_catalogue for table
private.providers, public.models, private.model_routes, public.model_aliases, private.error_codes,
private.provider_words, private.plans, private.settings, private.alert_rules,
private.billing_providers, public.credit_products, private.push_texts, private.webhook_endpoints;
