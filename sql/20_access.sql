-- Row level security: who may read what. Nobody writes a table: the functions do.
--
-- Users read their own rows in public, but not what they deleted; the catalogue is read through
-- list_models(). Private tables have RLS (92) and no policy, which denies everybody but their owner
-- even where a gateway grants too much. Functions run as that owner.

alter table public.entitlements enable row level security;
alter table public.credit_ledger enable row level security;
alter table public.models enable row level security;
alter table public.model_aliases enable row level security;
alter table public.batches enable row level security;
alter table public.generations enable row level security;
alter table public.images enable row level security;

revoke all on table public.entitlements, public.credit_ledger, public.models,
public.model_aliases, public.batches, public.generations, public.images
from public, anon, authenticated, service_role;
revoke all on sequence public.credit_ledger_id_seq from public, anon, authenticated, service_role;
revoke all on domain public.job_status, public.ledger_kind, public.credits, public.image_count,
public.params, private.job_stage, private.attempt_outcome
from public, anon, authenticated, service_role;

grant select on table public.entitlements, public.credit_ledger, public.batches,
public.generations, public.images to authenticated, service_role;
grant select, insert, update on table public.models to service_role;
grant select, insert, update, delete on table public.model_aliases to service_role;

-- The user of the request's JWT; null if it names none. As Supabase's auth.uid(), which fails where
-- the sub is no uuid or the claims are no JSON, and which each transaction would plan anew.
--
-- Raises: PT401 not_authenticated.
create function private.caller_id() returns uuid
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid;
exception when data_exception then
  perform private.refuse(
    'not_authenticated', 'The sub of the token is no user''s id.', 'Sign in again.'
  );
  return null;
end;
$$;

create policy "Users read their own entitlement" on public.entitlements
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own ledger" on public.credit_ledger
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own batches" on public.batches
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own generations" on public.generations
for select to authenticated using (user_id = (select private.caller_id()) and deleted_at is null);

-- The policy above applies inside, too: the images of a deleted generation are hidden with it.
create policy "Users read their own images" on public.images
for select to authenticated using (
  user_id = (select private.caller_id())
  and exists (
    select from public.generations as g
    where g.id = images.generation_id
  )
);

-- Whether a path is of a file below a folder, whoever reads it: no part of it is empty or leads up,
-- in whatever spelling.
create function private.is_plain_path(p_path text) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select octet_length(p_path) <= 512
    and p_path ~ '^[^/]+(/[^/]+)+$'
    and p_path !~* '(/|\\|%(25)*(2f|5c))(\.|%(25)*2e){1,2}(/|\\|%(25)*(2f|5c)|$)'
$$;

-- Whether a user may put a file there: it has a name of its own below the folder, and the user has
-- not as many others as may be kept. Who uploads several at once may get a few more in.
create function private.may_store_input(p_path text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return private.is_plain_path(p_path) and (
    -- As a filter: the planner may else read the whole bucket.
    select count(*) filter (where o.bucket_id = 'inputs' and o.name <> p_path)
      < (select s.max_input_files from private.settings as s)
    from storage.objects as o
    -- From <id>/ up to <id>0, the next character: operators that the index of names serves.
    where o.name ~>=~ concat(auth.uid(), '/') and o.name ~<~ concat(auth.uid(), '0')
  );
end;
$$;

-- The caller's folders: see folders_of (42).
create function private.own_folders() returns text[]
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
begin
  return private.folders_of(auth.uid());
end;
$$;

-- Storage: outputs are read by their owner and written by the worker alone; inputs for
-- image-to-image are put into the user's own folder. On a text, so that where the table is
-- another's it can be shown to somebody who may.
do $do$
declare
  v_policies text := $policies$
  create policy "Users read their own generated images" on storage.objects
  for select to authenticated using (
    bucket_id = 'generations'
    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])
  );
  create policy "Users read their own input images" on storage.objects
  for select to authenticated using (
    bucket_id = 'inputs'
    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])
  );
  create policy "Users add their own input images" on storage.objects
  for insert to authenticated with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users replace their own input images" on storage.objects
  for update to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  ) with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
    and private.may_store_input(name)
  );
  create policy "Users delete their own input images" on storage.objects
  for delete to authenticated using (
    bucket_id = 'inputs'
    and split_part(name, '/', 1) = any ((select private.own_folders())::text[])
  );
$policies$;
begin
  if to_regclass('storage.objects') is null then
    raise notice 'Darkroom: no storage.objects here; buckets and their policies are skipped';
    return;
  end if;
  begin
    execute v_policies;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on storage.objects; until its owner, or '
      'Supabase''s SQL editor, has run these, users reach no file: %', v_policies;
  end;
end;
$do$;
