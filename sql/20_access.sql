-- Row level security: who may read what. Nobody writes a table: the functions do.
--
-- Users read their own rows in public; the catalogue is read through list_models(). Private tables
-- have RLS and no policy, which denies everybody but their owner even where a gateway grants too
-- much. Functions run as that owner.

alter table public.entitlements enable row level security;
alter table public.credit_ledger enable row level security;
alter table public.models enable row level security;
alter table public.model_aliases enable row level security;
alter table public.batches enable row level security;
alter table public.generations enable row level security;
alter table public.images enable row level security;
alter table private.ready_jobs enable row level security;
alter table private.running_jobs enable row level security;
alter table private.workers enable row level security;
alter table private.attempts enable row level security;
alter table private.error_codes enable row level security;
alter table private.providers enable row level security;
alter table private.plans enable row level security;
alter table private.settings enable row level security;
alter table private.webhook_endpoints enable row level security;
alter table private.push_tokens enable row level security;
alter table private.push_texts enable row level security;
alter table private.deliveries enable row level security;

revoke all on all tables in schema private from public, anon, authenticated, service_role;
revoke all on all sequences in schema private from public, anon, authenticated, service_role;
revoke all on table public.entitlements, public.credit_ledger, public.models,
public.model_aliases, public.batches, public.generations, public.images
from public, anon, authenticated, service_role;
revoke all on sequence public.credit_ledger_id_seq from public, anon, authenticated, service_role;

grant select on table public.entitlements, public.credit_ledger, public.batches,
public.generations, public.images
to authenticated, service_role;
grant select, insert, update on table public.models to service_role;
grant select, insert, update, delete on table public.model_aliases to service_role;

create policy "Users read their own entitlement" on public.entitlements
for select to authenticated using (user_id = (select auth.uid()));

create policy "Users read their own ledger" on public.credit_ledger
for select to authenticated using (user_id = (select auth.uid()));

create policy "Users read their own batches" on public.batches
for select to authenticated using (user_id = (select auth.uid()));

create policy "Users read their own generations" on public.generations
for select to authenticated using (user_id = (select auth.uid()));

create policy "Users read their own images" on public.images
for select to authenticated using (user_id = (select auth.uid()));

-- Storage: outputs are read by their owner and written by the worker alone; inputs for
-- image-to-image are put into the user's own folder.
do $$
begin
  if to_regclass('storage.objects') is null then
    raise notice 'Darkroom: no storage.objects here; buckets and their policies are skipped';
    return;
  end if;
  create policy "Users read their own generated images" on storage.objects
  for select to authenticated using (
    bucket_id = 'generations' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users read their own input images" on storage.objects
  for select to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users add their own input images" on storage.objects
  for insert to authenticated with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users replace their own input images" on storage.objects
  for update to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  ) with check (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
  create policy "Users delete their own input images" on storage.objects
  for delete to authenticated using (
    bucket_id = 'inputs' and split_part(name, '/', 1) = (select auth.uid())::text
  );
end;
$$;
