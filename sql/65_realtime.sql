-- Realtime: a hint that something changed, never the contract. Skipped where Supabase Realtime is
-- not.
--
-- Each new state of a generation is broadcast on its user's private topic user:<user id>, where
-- nobody else can listen and no client can send. Clients then read, as they would polling. A hint
-- may be lost, but fails no job and holds none up: realtime.send turns its errors (no partition for
-- today, say) into warnings.
--
-- Where nobody has ever listened, Realtime has made no partition, and each hint is a warning in
-- PostgreSQL's log: settings.broadcasts = false sends none.
--
-- For clients that use postgres_changes, generations is in the publication, with all its columns.
-- A list of columns would protect nothing: Realtime decodes with wal2json, which asks publications
-- for no columns, and then gives each subscriber the columns its role may select, of the rows it
-- may see. But with a list every update of a job would fail once somebody sets the table's replica
-- identity to full, for old_record. What RLS cannot hide is a deleted row: that it is gone, and its
-- id, reach all who subscribe without a filter.

-- Sends with the rights of Darkroom's owner: whatever changes a state is security definer. Realtime
-- locks its table while it adds or drops a partition; a hint does not wait for that.
create function private.broadcast_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms' as $$
begin
  if not (select s.broadcasts from private.settings as s) then
    return null;
  end if;
  perform realtime.send(
    jsonb_build_object('job_id', new.id, 'status', new.status),
    'generation',
    'user:' || new.user_id,
    true
  );
  return null;
exception
  -- The schema is Supabase's: it may go or close one day, and jobs go on.
  when undefined_function or invalid_schema_name or insufficient_privilege then
    raise warning 'Darkroom: not broadcast: %', sqlerrm using errcode = '01000';
    return null;
end;
$$;

-- On Supabase neither table nor publication need be ours: supautils.policy_grants lets postgres,
-- and no other role, make policies on realtime.messages, but not comment on them.
do $$
begin
  if to_regprocedure('realtime.send(jsonb, text, text, boolean)') is null
    or to_regprocedure('realtime.topic()') is null or to_regclass('realtime.messages') is null then
    raise notice 'Darkroom: no % here; broadcasts are skipped, clients poll',
      case when to_regnamespace('realtime') is null then 'schema realtime'
        else 'realtime.send, realtime.topic or realtime.messages' end;
    return;
  end if;
  create trigger generations_broadcast_insert after insert on public.generations
  for each row execute function private.broadcast_generation();
  create trigger generations_broadcast_status after update of status on public.generations
  for each row when (old.status is distinct from new.status)
  execute function private.broadcast_generation();
  begin
    -- Realtime asks when a client joins: it writes one message of each extension on the topic,
    -- looks which of them the client sees, and rolls back.
    create policy "Users receive hints about their own jobs" on realtime.messages
    for select to authenticated using (
      extension = 'broadcast'
      and topic = (select realtime.topic())
      and topic = 'user:' || (select auth.uid())::text
    );
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to make policies on realtime.messages; until the one in '
      'sql/65_realtime.sql is made in the SQL editor, clients cannot join and poll';
  end;
  begin
    if exists (select from pg_catalog.pg_publication where pubname = 'supabase_realtime')
      and not exists (
        select from pg_catalog.pg_publication_tables
        where pubname = 'supabase_realtime'
          and schemaname = 'public' and tablename = 'generations'
      ) then
      alter publication supabase_realtime add table public.generations;
    end if;
  exception when insufficient_privilege then
    raise notice 'Darkroom: no right to change publication supabase_realtime; postgres_changes '
      'will not tell of generations';
  end;
end;
$$;
