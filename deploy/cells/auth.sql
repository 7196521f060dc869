-- For a cell that has no Supabase Auth, before sql/: the columns of auth.users that Darkroom reads.
-- Rows come from home (cells.put_user). Addresses stay there, and so home says who is welcome.

create schema if not exists auth;

create table if not exists auth.users (
  id uuid primary key,
  is_anonymous boolean,
  banned_until timestamptz,
  deleted_at timestamptz,
  is_welcome boolean
);

create or replace function auth.uid() returns uuid language sql stable as $$
  select (nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub')::uuid
$$;

-- What home says of a user: the row of auth.users, or that there is none any more. Triggers on it
-- (42, 84) do the rest.
create function cells.put_user(p_user jsonb) returns void
language sql security definer set search_path = pg_catalog, pg_temp as $$
  insert into auth.users as u
  select r.* from jsonb_populate_record(null::auth.users, p_user) as r
  on conflict (id) do update set
    is_anonymous = excluded.is_anonymous, banned_until = excluded.banned_until,
    deleted_at = excluded.deleted_at, is_welcome = excluded.is_welcome
$$;

create function cells.drop_user(p_user_id uuid) returns void
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if exists (select from cells.moves as m where m.user_id = p_user_id) then
    raise exception 'the user is moving: try again';
  end if;
  perform private.lock_jobs(p_user_id);
  delete from auth.users where id = p_user_id;
  delete from public.entitlements where user_id = p_user_id;  -- moved here when Auth had deleted it
end;
$$;

grant execute on function cells.put_user, cells.drop_user to darkroom_entry;
