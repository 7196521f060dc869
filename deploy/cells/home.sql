-- What home has beside cell.sql: Auth and Storage are here, and so is the directory.
--
-- A new user is given a cell, and what Auth changes is told to the user's cell. A cell that is away
-- holds up no sign-up: follow_changed_user (42) notes the user, and retention tries again. Until the
-- cell knows of a new user the API says unavailable.

create extension if not exists dblink with schema cells;

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
  select new.id, '+' || chosen.name
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

create function cells.tell(
  p_cell text, p_statement text, p_options text default ''
) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_address text := (select c.address from cells.cells as c where c.name = p_cell);
begin
  if v_address is null then
    raise exception 'no such cell: %', p_cell;
  end if;
  return (
    select a.answer from cells.dblink(concat_ws(' ', v_address, p_options), p_statement)
      as a (answer text)
  );
end;
$$;

-- An address is welcomed once in all cells. That cells are told: addresses themselves stay here.
create or replace function private.follow_elsewhere(p_user_id uuid) returns boolean
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_cell text;
  v_user jsonb;
  v_identities bytea[];
  v_new integer;
begin
  perform pg_advisory_xact_lock_shared(hashtextextended(p_user_id::text, 0));  -- see pack_user
  select u.cell into v_cell from cells.users as u where u.user_id = p_user_id for update;
  v_user := (select to_jsonb(u) from auth.users as u where u.id = p_user_id);
  if v_user is null then
    if v_cell = 'moving' then
      raise exception 'the user is moving: try again';
    end if;
    perform cells.tell(
      c.name, format('select cells.drop_user(%1$L) from cells.forget_guest(%1$L)', p_user_id)
    )
    from cells.cells as c where c.name <> 'home';
    perform cells.forget_guest(p_user_id);
    perform private.lock_jobs(p_user_id);
    delete from private.budgets where user_id = p_user_id;
    delete from public.entitlements where user_id = p_user_id;  -- came when Auth had deleted it
    delete from cells.users where user_id = p_user_id;
    delete from private.merged_users where into_id = p_user_id;
  elsif v_cell is null then
    return false;
  else
    v_identities := private.identities_of(v_user);
    insert into private.welcomed_identities (identity)
    select i.identity from private.settings as s cross join unnest(v_identities) as i (identity)
    where s.welcome_once_per_identity
    on conflict (identity) do nothing;
    get diagnostics v_new = row_count;
    perform cells.tell(ltrim(v_cell, '+'), format('select cells.put_user(%L)', (
      select jsonb_object_agg(k, v_user -> k)
      from unnest('{id,is_anonymous,banned_until,deleted_at}'::text[]) as k
    ) || jsonb_build_object(
      'is_welcome', v_new = cardinality(v_identities) or not s.welcome_once_per_identity
    )))
    from private.settings as s;
    update cells.users set cell = ltrim(v_cell, '+') where user_id = p_user_id and cell like '+%';
  end if;
  return true;
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

-- Files of users who are nowhere are home's to look for: of nobody whom a cell has, also as one who
-- was merged into another and is gone from Auth.
create or replace function private.has_folder(p_folder uuid) returns boolean
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_owner uuid := private.owner_of(p_folder);
begin
  return exists (select from public.entitlements as e where e.user_id = v_owner) or not exists (
    select from cells.users as u where u.user_id in (p_folder, v_owner)
  ) and not exists (
    select from cells.cells as c
    where c.name <> 'home'
      and cells.tell(c.name, format('select private.has_folder(%L)', p_folder)) = 't'
  );
end;
$$;

-- Home's policies on files ask who was merged into whom, of everybody. Home is sent it by all cells,
-- so that where a user moves it comes once more, and goes.
create function cells.keep_merged_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if tg_op = 'INSERT' then
    update private.merged_users set into_id = new.into_id where user_id = new.user_id;
    if not found then
      return new;
    end if;
  end if;
  return null;
end;
$$;

create trigger merged_users_keep before insert or delete on private.merged_users
for each row execute function cells.keep_merged_user();
alter table private.merged_users enable replica trigger merged_users_keep;

-- Moving a user: see move.sql. The first part takes all from one cell to another and says so in the
-- directory, the second has the first cell forget. Each may be repeated, and must be committed
-- before what is next: what is broken off, retention finishes. Those who were merged into the user
-- are moved along.

-- Answers moved, or running: a job, or a delivery.
create function cells.start_move(p_user_id uuid, p_cell text) returns text
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_from text;
  v_package text;
  v_ids uuid[];
  v_patience text := 'options=''-c statement_timeout=1h''';
begin
  perform pg_advisory_xact_lock(hashtextextended('move ' || p_user_id, 0));
  v_from := coalesce((select u.cell from cells.users as u where u.user_id = p_user_id), 'home');
  if v_from = p_cell then
    return 'moved';
  elsif v_from = 'moving' then
    v_from := 'home';
  elsif v_from like '+%' then
    perform private.follow_user(p_user_id);
    v_from := ltrim(v_from, '+');
  end if;
  perform cells.tell(p_cell, 'select 1');  -- nobody is packed for a cell that is away
  v_package := cells.tell(
    v_from, format('select cells.pack_user(%L, %L)', p_user_id, p_cell), v_patience
  );
  if v_package is null then
    return 'running';
  end if;
  perform cells.tell(p_cell, format('select cells.unpack_user(%L)', v_package), v_patience);
  v_ids := array(select jsonb_array_elements_text(v_package::jsonb -> 'user_ids'));
  delete from cells.users where user_id = any (v_ids);
  insert into cells.users (user_id, cell)
  select id, p_cell from unnest(v_ids) as id where p_cell <> 'home';
  return 'moved';
end;
$$;

-- Has the cells where the user was forget, p_from or all; never one in which the user is packed now,
-- or lives by now. Others may have moved the user on since this move began.
create function cells.end_move(p_user_id uuid, p_from text default null) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_is_gone boolean := not exists (select from auth.users as u where u.id = p_user_id);
  v_at text;
  v_cell text;
begin
  perform pg_advisory_xact_lock(hashtextextended('move ' || p_user_id, 0));
  v_at := coalesce((select u.cell from cells.users as u where u.user_id = p_user_id), 'home');
  if v_at = 'moving' then
    return;
  end if;
  if not v_is_gone then
    perform private.follow_user(f.id) from unnest(private.folders_of(p_user_id)) as f (id);
  end if;
  for v_cell in
    select c.name from cells.cells as c where c.name <> v_at and c.name = coalesce(p_from, c.name)
  loop
    perform cells.tell(v_cell, format('select cells.leave_user(%L, %L)', p_user_id, v_at));
  end loop;
  if v_is_gone then
    perform private.follow_user(p_user_id);
  end if;
end;
$$;

-- Both, waiting for what runs as long as it is told to. Another call goes on where one broke off.
create procedure cells.move_user(
  p_user_id uuid, p_cell text, inout state text default null, p_wait interval default '0'
)
language plpgsql as $$
declare
  v_until timestamptz := clock_timestamp() + p_wait;
  v_from text := coalesce((select u.cell from cells.users as u where u.user_id = p_user_id), 'home');
begin
  loop
    state := cells.start_move(p_user_id, p_cell);
    commit;
    exit when state = 'moved' or clock_timestamp() > v_until;
    perform pg_sleep(0.5);
  end loop;
  if state = 'moved' then
    v_from := case v_from when 'moving' then 'home' else ltrim(v_from, '+') end;
    perform cells.end_move(p_user_id, nullif(v_from, p_cell));
  end if;
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
      when v_cells <@ array(select c.name from cells.cells as c)
        then cells.start_move(p_user_id, v_cells[2])
      else 'moving'
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
create or replace function private.hand_over_events(
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

-- A step of retention (85): moves that were begun more than a minute ago, one part at a time.
create or replace function private.finish_moves(
  p_place text, p_at_most integer, out place text, out done integer
)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_cell text;
  v_move record;
begin
  done := 0;
  for v_cell in select c.name from cells.cells as c order by c.name loop
    begin
      for v_move in
        select m.*, coalesce(u.cell, 'home') as at from json_to_recordset(cells.tell(v_cell,
          'select json_agg(json_build_object(''user_id'', user_id, ''cell'', cell))'
          ' from cells.moves where packed_at < now() - interval ''1 minute'''
        )::json) as m (user_id uuid, cell text)
        left join cells.users as u on u.user_id = m.user_id
      loop
        begin
          if v_move.at in (v_cell, 'moving') then
            perform cells.start_move(v_move.user_id, v_move.cell);
          else
            perform cells.end_move(v_move.user_id, v_cell);
          end if;
          done := done + 1;
        exception when others then
          perform private.note_skipped('finish_moves', v_move.user_id::text, sqlstate, sqlerrm);
        end;
      end loop;
    exception when others then
      perform private.note_skipped('finish_moves', v_cell, sqlstate, sqlerrm);
    end;
  end loop;
end;
$$;

insert into private.retention_walks (name) values ('finish_moves') on conflict do nothing;

revoke all on function private.follow_elsewhere, private.has_folder, private.finish_moves,
private.hand_over_events from public;
grant execute on function cells.bring, cells.end_move, cells.hand_over to darkroom_entry;

-- Everybody reads the files of what is shared, wherever its owner lives.
grant usage on schema cells to anon, authenticated;
grant select on cells.shared_paths to anon, authenticated;
drop policy if exists "Everybody reads images that are shared in other cells" on storage.objects;
create policy "Everybody reads images that are shared in other cells" on storage.objects
for select to anon, authenticated using (
  bucket_id = 'generations'
  and exists (select from cells.shared_paths as s where s.path = objects.name)
);

-- Cells read which files there are.
grant usage on schema storage to darkroom_entry;
grant select on storage.objects to darkroom_entry;
drop policy if exists "Cells know which files there are" on storage.objects;
create policy "Cells know which files there are" on storage.objects
for select to darkroom_entry using (bucket_id in ('generations', 'inputs'));

drop publication if exists darkroom_directory, darkroom_catalogue;
create publication darkroom_directory for table cells.cells, cells.users;
-- What operators set. What each database finds out itself, or is told by share.sql, is not sent.
create publication darkroom_catalogue for table
private.providers (
  name, base_url, secret, key_hosts, hosts, max_running, result_ttl, lost_create, settle,
  buys_again, is_active, recipe
),
private.plans (
  name, max_active, max_per_minute, full_minutes_per_day, max_burned_per_day, max_batch, weight,
  welcome_credits, busy_after, has_budgets
),
private.budgets (id, provider, model_id, plan, user_id, period, limit_usd, on_breach),
public.models, private.model_routes, public.model_aliases, private.error_codes,
private.provider_words, private.settings, private.alert_rules, private.billing_providers,
public.credit_products, private.push_texts, private.webhook_endpoints,
-- The app's, not its users': what goes is told by all of a row.
public.prompt_templates where (user_id is null);
alter table public.prompt_templates replica identity full;
