-- For a cell that has no Storage, after sql/: which files there are, as home's Storage has on record.
-- Variables of psql: host, port, dbname of home, and darkroom_entry's password there.

create extension postgres_fdw with schema cells;

create server home foreign data wrapper postgres_fdw options (
  host :'host', port :'port', dbname :'dbname', connect_timeout '3', tcp_user_timeout '5000'
);
create user mapping for public server home options (user 'darkroom_entry', password :'password');

create schema storage;
create foreign table storage.objects (
  bucket_id text, name text, created_at timestamptz, updated_at timestamptz
) server home options (schema_name 'storage', table_name 'objects');
