-- A stand-in for the roles and rights of a Supabase project of 2026-11, where there are only the
-- schemas auth and storage of Supabase Lite. It comes before realtime.sql, in a cluster of its own.
--
-- supabase_postgres stands for `postgres`: it owns the database, makes roles, may use auth and
-- storage, and is no superuser. It also owns storage.objects: at Supabase that table is the storage
-- server's, and supautils.policy_grants has postgres make policies on it all the same.

create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit;
grant anon, authenticated, service_role to authenticator;

create role supabase_auth_admin nologin noinherit;
create role supabase_storage_admin nologin noinherit;
create role supabase_realtime_admin nologin noinherit;

create role supabase_postgres login createdb createrole replication bypassrls;
grant anon, authenticated, service_role to supabase_postgres with admin option;
grant pg_monitor, pg_read_all_data, pg_signal_backend to supabase_postgres;

do $$
declare
  v_table record;
begin
  execute format('alter database %I owner to supabase_postgres', current_database());
  for v_table in select * from pg_tables where schemaname in ('auth', 'storage') loop
    execute format(
      'alter table %I.%I owner to supabase_%1$s_admin', v_table.schemaname, v_table.tablename
    );
  end loop;
end;
$$;
alter schema auth owner to supabase_auth_admin;
alter schema storage owner to supabase_storage_admin;
grant usage on schema auth, storage to supabase_postgres, anon, authenticated, service_role;
grant all on all tables in schema auth, storage to supabase_postgres;
alter table storage.objects owner to supabase_postgres;

-- Rows go through Storage's API, or with the setting it makes.
create function storage.protect_delete() returns trigger language plpgsql as $$
begin
  if current_setting('storage.allow_delete_query', true) is distinct from 'true' then
    raise 'Direct deletion from storage tables is not allowed' using errcode = '42501';
  end if;
  return null;
end;
$$;
create trigger protect_buckets_delete before delete on storage.buckets
for each statement execute function storage.protect_delete();

create schema extensions;
grant all on schema extensions to supabase_postgres;
grant usage on schema extensions to anon, authenticated, service_role;
create extension pgcrypto with schema extensions;
create extension "uuid-ossp" with schema extensions;

-- Where it can be had. What Supabase does when postgres creates it: its tables are to be read only.
do $$
begin
  if current_database() = current_setting('cron.database_name', true) then
    create extension pg_cron with schema pg_catalog;
    grant usage on schema cron to supabase_postgres with grant option;
    grant all on all functions in schema cron to supabase_postgres with grant option;
    grant all on all tables in schema cron to supabase_postgres with grant option;
    revoke all on table cron.job from supabase_postgres;
    grant select on table cron.job to supabase_postgres with grant option;
    revoke trigger on cron.job_run_details from supabase_postgres;
  end if;
end;
$$;

-- Granted when the project was made, and revoked since 2026-10-30: from service_role, too.
alter default privileges for role supabase_postgres in schema public
grant all on tables to anon, authenticated, service_role;
alter default privileges for role supabase_postgres in schema public
grant all on sequences to anon, authenticated, service_role;
alter default privileges for role supabase_postgres in schema public
grant all on functions to anon, authenticated, service_role;
alter default privileges for role supabase_postgres in schema public
revoke select, insert, update, delete on tables from anon, authenticated, service_role;
alter default privileges for role supabase_postgres in schema public
revoke usage, select on sequences from anon, authenticated, service_role;
alter default privileges for role supabase_postgres in schema public
revoke execute on functions from anon, authenticated, service_role;
