-- For a cell that has no Auth and no Storage, after sql/: which files there are, as home's Storage has on record.
-- The setting cells.secret is home's address in the directory.

create extension if not exists postgres_fdw with schema cells;
select cells.make_server('home', current_setting('cells.secret'));

create schema if not exists storage;
create foreign table if not exists storage.objects (
  bucket_id text, name text, created_at timestamptz, updated_at timestamptz
) server home options (schema_name 'storage', table_name 'objects');

-- What home's policies on files ask of users who live here: which files are shared, and who was
-- merged into whom. Home is sent both.

create function cells.note_shares() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  if tg_op <> 'INSERT' then
    delete from cells.shared_paths where path in (old.storage_path, old.preview_path);
  end if;
  if tg_op <> 'DELETE' then
    insert into cells.shared_paths (path)
    select p from unnest(array[new.storage_path, new.preview_path]) as p
    where new.share_id is not null and p is not null;
  end if;
  return null;
end;
$$;

create trigger images_note_new_shares after insert on public.images
for each row when (new.share_id is not null) execute function cells.note_shares();
create trigger images_note_shares after update of share_id on public.images
for each row when (old.share_id is distinct from new.share_id)
execute function cells.note_shares();
create trigger images_note_ended_shares after delete on public.images
for each row when (old.share_id is not null) execute function cells.note_shares();
-- Also of a user who moves here or away.
alter table public.images enable always trigger images_note_new_shares;
alter table public.images enable always trigger images_note_ended_shares;

-- Of what home divides, a cell has nothing until it is told its part (share.sql).
alter table private.providers alter column part set default 0;
alter table private.budgets alter column part_usd set default 0;
alter table private.budgets enable always trigger budgets_are_looked_at_again;

drop publication if exists darkroom_files;
create publication darkroom_files for table cells.shared_paths, private.merged_users;

-- Whether the address of a user was welcomed is known to home, which all cells' users sign up with:
-- see follow_user. Here it says so by one that cannot be new twice.
create or replace function private.identities_of(p_user jsonb) returns bytea[]
language sql immutable set search_path = pg_catalog, pg_temp
return case when p_user ->> 'is_welcome' = 'false' then '{"",""}'::bytea[] else '{}' end;
