-- What a Supabase project has and Supabase Lite does not make, or makes otherwise. Run at each start.

-- The roles of the API, whose requests are ended in time, and whom PostgREST logs in as.
do $$
begin
  if to_regrole('anon') is null then
    create role anon nologin noinherit;
  end if;
  if to_regrole('authenticated') is null then
    create role authenticated nologin noinherit;
  end if;
  if to_regrole('service_role') is null then
    create role service_role nologin noinherit bypassrls;
  end if;
  if to_regrole('authenticator') is null then
    create role authenticator login noinherit;
  end if;
  if to_regrole('darkroom_monitor') is not null then
    grant darkroom_monitor to authenticator; -- of a stack from before there was an authenticator
  end if;
end;
$$;
grant anon, authenticated, service_role to authenticator;
alter role anon set statement_timeout = '3s';
alter role authenticated set statement_timeout = '8s';

-- Lite's reads only the older setting, which PostgREST no longer makes.
create or replace function auth.uid() returns uuid language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid
$$;

-- With its first request for data Lite grants all tables of a schema in which one has RLS to every
-- role of the API. It finds them in `pg_class`: this one, as Lite's search_path has it first, shows it
-- none but its own.
create schema if not exists lite;
create or replace view lite.pg_class as
select * from pg_catalog.pg_class where relnamespace in ('auth'::regnamespace, 'storage'::regnamespace);

-- PostgREST is told of every change, so that a new function can be called at once.
create schema if not exists extensions;
create or replace function extensions.pgrst_ddl_watch() returns event_trigger
language plpgsql as $$
begin
  notify pgrst, 'reload schema';
end;
$$;
drop event trigger if exists pgrst_ddl_watch;
create event trigger pgrst_ddl_watch on ddl_command_end
when tag in (
  'CREATE FUNCTION', 'ALTER FUNCTION', 'DROP FUNCTION', 'CREATE TABLE', 'ALTER TABLE', 'DROP TABLE',
  'CREATE VIEW', 'ALTER VIEW', 'DROP VIEW', 'GRANT', 'REVOKE', 'COMMENT'
)
execute function extensions.pgrst_ddl_watch();
