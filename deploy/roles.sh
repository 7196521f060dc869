#!/bin/sh
# Runs once, on an empty data folder: the roles and schemas that Auth, PostgREST and Storage expect, and
# the worker's login.
# Auth and Storage may make no roles: in PostgreSQL 15 who may can also give itself a shell here.
set -eu
psql -v ON_ERROR_STOP=1 -X --username "${POSTGRES_USER:-postgres}" --dbname postgres \
  -v authenticator="$AUTHENTICATOR_PASSWORD" -v auth="$AUTH_ADMIN_PASSWORD" \
  -v storage="$STORAGE_ADMIN_PASSWORD" -v worker="$WORKER_PASSWORD" <<'SQL'
create role anon nologin noinherit;
create role authenticated nologin noinherit;
create role service_role nologin noinherit bypassrls;
create role authenticator login noinherit password :'authenticator';
grant anon, authenticated, service_role to authenticator;
create role darkroom_worker login noinherit password :'worker';
create role supabase_auth_admin login noinherit password :'auth';
create role supabase_storage_admin login noinherit password :'storage';
grant authenticator to supabase_storage_admin;
grant anon, authenticated, service_role to supabase_storage_admin;
alter role anon set statement_timeout = '3s';
alter role authenticated set statement_timeout = '8s';
-- What only a login can have: for whom else a token names, against a gateway that froze within a
-- transaction, and against an answer whose sorting would fill the disk.
alter role authenticator set statement_timeout = '60s';
alter role authenticator set idle_in_transaction_session_timeout = '15s';
alter role authenticator set temp_file_limit = '256MB';
create schema auth authorization supabase_auth_admin;
create schema storage authorization supabase_storage_admin;
grant usage on schema auth, storage to anon, authenticated, service_role;
alter default privileges for role supabase_storage_admin in schema storage
grant all on tables to anon, authenticated, service_role;
alter default privileges for role supabase_storage_admin in schema storage
grant all on sequences to anon, authenticated, service_role;
alter default privileges for role supabase_storage_admin in schema storage
grant all on functions to anon, authenticated, service_role;
grant create on database postgres to supabase_auth_admin, supabase_storage_admin;
alter role supabase_auth_admin set search_path = auth;
alter role supabase_storage_admin set search_path = storage;
SQL
