-- A stand-in for what Supabase Realtime (of 2026-07) brings into a database, as far as Darkroom
-- meets it: same signatures, owners, grants and errors. Messages stay in the table to be looked at.
--
-- The role supabase_postgres stands for `postgres` on Supabase, which is no superuser there: it
-- installs Darkroom, owns the publication, may use the schema, and owns nothing in it.

do $$
begin
  if to_regrole('supabase_postgres') is null then
    create role supabase_realtime_admin nologin noinherit;
    create role supabase_postgres nologin createrole bypassrls;
    if to_regrole('anon') is null then
      create role anon nologin noinherit;
      create role authenticated nologin noinherit;
      create role service_role nologin noinherit bypassrls;
    end if;
    if to_regrole('darkroom_worker') is null then
      create role darkroom_worker login noinherit;
    end if;
    grant anon, authenticated, service_role, darkroom_worker to supabase_postgres
    with admin option;
    grant pg_monitor to supabase_postgres;
  end if;
end;
$$;

create schema realtime;
grant usage on schema realtime to supabase_postgres, anon, authenticated, service_role;
grant all on schema realtime to supabase_realtime_admin;

create table realtime.messages (
  topic text not null,
  extension text not null,
  payload jsonb,
  event text,
  private boolean default false,
  updated_at timestamp not null default now(),
  inserted_at timestamp not null default now(),
  id uuid not null default gen_random_uuid(),
  binary_payload bytea,
  primary key (id, inserted_at)
) partition by range (inserted_at);

alter table realtime.messages enable row level security;
alter table realtime.messages owner to supabase_realtime_admin;
grant all on realtime.messages to supabase_postgres;
grant select, insert, update on realtime.messages to anon, authenticated, service_role;

-- Realtime makes one for each day, and only once somebody connects; here one is enough.
create table realtime.messages_now partition of realtime.messages
for values from (current_date - 1) to (current_date + 3);

create function realtime.topic() returns text
language sql stable
as $$ select nullif(current_setting('realtime.topic', true), '') $$;

-- With the rights of the caller, and no error ever: of a message that is lost, a warning tells.
create function realtime.send(
  payload jsonb, event text, topic text, private boolean default true
)
returns void
language plpgsql
as $$
declare
  v_id uuid := gen_random_uuid();
begin
  perform set_config('realtime.topic', topic, true);
  insert into realtime.messages (id, payload, event, topic, private, extension)
  values (v_id, jsonb_build_object('id', v_id) || payload, event, topic, private, 'broadcast');
exception when others then
  raise warning 'WarnSendingBroadcastMessage: %', sqlerrm;
end;
$$;

alter function realtime.topic() owner to supabase_realtime_admin;
alter function realtime.send(jsonb, text, text, boolean) owner to supabase_realtime_admin;

create publication supabase_realtime with (publish = 'insert, update, delete, truncate');
alter publication supabase_realtime owner to supabase_postgres;

-- What `postgres` may do on Supabase with the rest of the database.
do $$
begin
  execute format('grant create on database %I to supabase_postgres', current_database());
end;
$$;
grant all on schema public to supabase_postgres;
grant usage on schema auth, storage to supabase_postgres;
grant all on all tables in schema auth, storage to supabase_postgres;
alter table storage.objects owner to supabase_postgres;
