-- Realtime: a hint that something changed, never the contract. Skipped where schema realtime is
-- not.
--
-- Each new state of a generation is broadcast on the private topic user:<user id>, and generations
-- is in the publication for clients that use postgres_changes. Clients then read, as they would
-- polling. realtime.send swallows its own errors, so it can lose a hint but never fail a job.

-- Definer: the functions that change a state run for users and workers who have no rights in
-- realtime.
create or replace function private.broadcast_generation()
returns trigger
language plpgsql
security definer
set search_path = ''
as $$
begin
  perform realtime.send(
    jsonb_build_object('job_id', new.id, 'status', new.status),
    'generation',
    'user:' || new.user_id,
    true
  );
  return null;
end;
$$;

revoke all on function private.broadcast_generation()
from public, anon, authenticated, service_role;

do $$
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null
    or to_regprocedure('realtime.topic()') is null then
    raise notice 'Darkroom: no schema realtime here; broadcasts are skipped, clients poll';
    return;
  end if;
  create trigger generations_broadcast_insert after insert on public.generations
  for each row execute function private.broadcast_generation();
  create trigger generations_broadcast_status after update of status on public.generations
  for each row when (old.status is distinct from new.status)
  execute function private.broadcast_generation();
  create policy "Users receive hints about their own jobs" on realtime.messages
  for select to authenticated using (
    extension = 'broadcast' and (select realtime.topic()) = 'user:' || (select auth.uid())::text
  );
  if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime') then
    alter publication supabase_realtime add table public.generations;
  end if;
end;
$$;
