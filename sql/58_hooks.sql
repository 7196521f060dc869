-- Hooks: what the core asks its optional parts, here answered as where none is installed.
--
-- A part (95, 96, deploy/cells) replaces the answers that are its own. For all else it needs
-- nothing in the core: a job's end, a deletion and a user's leaving reach it by triggers of its own
-- on generations and entitlements, and what it keeps for a time goes by a step of retention (85),
-- which is a row.
-- Columns of our own tables that only a part sets (is_favorite, tags, share_id, shows_prompt) are
-- theirs from the beginning, and false, empty or null without it.

-- Where users live in several databases (deploy/cells), whether this one lives in another, which
-- has been told what Auth says: see follow_user (42).
create function private.follow_elsewhere(p_user_id uuid) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
return false;

-- And whether it is for this one to say which files of a folder are left over: see
-- expire_orphans (85).
create function private.has_folder(p_folder uuid) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
return true;

-- The user's generations with a tag: see list_generations (62).
create function private.walk_tag(
  p_user_id uuid, p_tag text, p_before uuid, p_at_most integer
) returns uuid[]
language sql immutable set search_path = pg_catalog, pg_temp
return '{}'::uuid[];

-- What workers ask when they look for something to tell (96).
create function private.due_lanes() returns setof text
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select null::text where false
$$;

comment on function private.due_lanes is 'Lanes of the outbox that have something to send now.';

create function private.claim_receipts(p_at_most integer)
returns table (delivery_id uuid, ticket text)
language sql security definer set search_path = pg_catalog, pg_temp as $$
  select null::uuid, null::text where false
$$;

comment on function private.claim_receipts is
  'Tickets of pushes that Expo took a quarter of an hour ago or more, and whose receipt was not '
  'read yet; a quarter of an hour later they are answered again.';

-- See queue_health().
create function private.outbox_health() returns jsonb
language sql stable set search_path = pg_catalog, pg_temp
return '{}'::jsonb;
