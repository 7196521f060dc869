-- Identities: what Auth says of a user, welcome credits, and one user who becomes part of another.
--
-- A user of Auth may be a guest (signed in anonymously), banned, or softly deleted. follow_user
-- brings the entitlement to what Auth's row says, and is called by triggers on that table. A guest
-- who becomes permanent keeps id, history and files; only the plan changes, and the welcome
-- credits of that plan follow, less what the guest was given.
--
-- A blocked user (banned, softly deleted, or merged) asks for nothing new. What such a user has in
-- the queue is canceled and given back, what runs ends as it would, and nothing is erased: that is
-- for the deletion of Auth's row (84).
--
-- Welcome credits are given once for each address, also where the account is gone. What is kept for
-- that is a hash that needs settings.identity_key to be made again.

alter table private.settings
add column welcome_once_per_identity boolean not null default true,
add column keep_identities interval default '2 years',
add column identity_key bytea not null
default sha256(uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())),
add constraint settings_keep_identities_is_in_reach check (
  keep_identities between '0' and '1000 years'
);

comment on column private.settings.welcome_once_per_identity is
  'Whether who signs up again with an address that was welcomed gets no welcome credits. false: '
  'each account gets them, and no address is kept.';
comment on column private.settings.keep_identities is
  'How long after its welcome an address is known; null: for ever.';
comment on column private.settings.identity_key is
  'Secret of this installation: without it nobody can find an address by its hash. A new one '
  'forgets all of them.';

create table private.welcomed_identities (
  identity bytea primary key,
  welcomed_at timestamptz not null default now()
);

comment on table private.welcomed_identities is
  'Addresses that were given welcome credits, as identities_of hashes them. They outlive their '
  'accounts, for settings.keep_identities.';

create index welcomed_identities_welcomed_at_idx on private.welcomed_identities (welcomed_at);

create table private.merged_users (
  user_id uuid primary key,
  into_id uuid not null,
  merged_at timestamptz not null default now(),
  constraint merged_users_are_two check (user_id <> into_id)
);

-- Parts move what is theirs by a trigger on it, as they erase it by one on entitlements.
comment on table private.merged_users is
  'Users who have become part of another by merge_user. Their files stay where they are: the '
  'folder is the other''s from then on, also when the user is gone from Auth.';
comment on column private.merged_users.into_id is
  'Never one who was merged: whoever is, takes all of these along.';

create index merged_users_into_id_idx on private.merged_users (into_id);

-- Whose a folder of Storage is.
create function private.owner_of(p_folder uuid) returns uuid
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return coalesce(
    (select m.into_id from private.merged_users as m where m.user_id = p_folder), p_folder
  );
end;
$$;

-- The folders that are a user's: the own one, unless the user was merged into another, and those of
-- users who were merged into this one.
create function private.folders_of(p_user_id uuid) returns uuid[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select p_user_id where private.owner_of(p_user_id) = p_user_id
    union all
    select m.user_id from private.merged_users as m where m.into_id = p_user_id
  );
end;
$$;

-- The addresses of a row of auth.users, hashed. An e-mail address counts without what follows a +,
-- and at Gmail, which ignores them, without dots: the ways in which one mailbox has many addresses.
create function private.identities_of(p_user jsonb) returns bytea[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select sha256(s.identity_key || convert_to(address.text, 'UTF8'))
    from private.settings as s
    cross join regexp_replace(
      lower(btrim(p_user ->> 'email')), '^([^+@]+)\+.*(@[^@]+)$', '\1\2'
    ) as e (mail)
    cross join lateral (values
      ('mail:' || case
        when e.mail ~ '^[^@]+@(gmail|googlemail)\.com$'
          then replace(split_part(e.mail, '@', 1), '.', '') || '@gmail.com'
        else e.mail
      end),
      ('phone:' || regexp_replace(p_user ->> 'phone', '\D', '', 'g'))
    ) as address (text)
    where address.text not in ('mail:', 'phone:')
    order by address.text
  );
end;
$$;

-- Makes the entitlement of a user, or brings it to what Auth says now. A second time changes
-- nothing.
--
-- Auth's row is read as JSON, for no function or trigger of ours may name a column there: some came
-- with later versions of Auth, and Auth could not alter the type of one that a trigger names.
--
-- Locks: the live jobs, the entitlement, the addresses that are welcomed.
create function private.follow_user(p_user_id uuid) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_user jsonb;
  v_known public.entitlements;
  v_is_guest boolean;
  v_blocked_until timestamptz;
  v_key text := 'welcome:' || p_user_id;
  v_credits integer;
  v_identities bytea[];
  v_new integer;
begin
  if private.follow_elsewhere(p_user_id) then
    return;
  end if;
  -- Most changes are a sign-in and of no interest. Of others all is read again under the locks.
  for v_look in 1 .. 2 loop
    v_user := (select to_jsonb(u) from auth.users as u where u.id = p_user_id);
    v_known := (select e from public.entitlements as e where e.user_id = p_user_id);
    v_is_guest := coalesce((v_user ->> 'is_anonymous')::boolean, false);
    v_blocked_until := case
      when v_user ->> 'deleted_at' is not null or private.owner_of(p_user_id) <> p_user_id
        then 'infinity'
      else (v_user ->> 'banned_until')::timestamptz
    end;
    if v_user is null or (v_known.is_guest, v_known.blocked_until)
      is not distinct from (v_is_guest, v_blocked_until) then
      return;
    end if;
    exit when v_known.user_id is null or v_look = 2;
    perform private.lock_jobs(p_user_id);
  end loop;
  if v_known.user_id is null then
    insert into public.entitlements (user_id, is_guest, blocked_until, ledger_after)
    select p_user_id, v_is_guest, v_blocked_until, coalesce(max(l.id), 0)
    from public.credit_ledger as l where l.user_id = p_user_id
    on conflict (user_id) do nothing;
  else
    if v_blocked_until > now() then
      perform private.cancel_jobs(p_user_id, array(
        select r.job_id from private.ready_jobs as r where r.user_id = p_user_id
      ));
    end if;
    update public.entitlements set is_guest = v_is_guest, blocked_until = v_blocked_until
    where user_id = p_user_id;
    if not v_known.is_guest or v_is_guest then
      return;
    end if;
    v_key := v_key || ':permanent';
  end if;
  select coalesce(p.welcome_credits, s.welcome_credits) - coalesce((
      select l.amount - l.debt from public.credit_ledger as l
      where l.external_id = 'welcome:' || p_user_id
    ), 0),
    case when s.welcome_once_per_identity then private.identities_of(v_user) else '{}' end
  into v_credits, v_identities
  from private.settings as s
  inner join private.plans as p on p.name = case when v_is_guest then 'guest' else 'free' end;
  if v_credits > 0 and private.owner_of(p_user_id) = p_user_id and not exists (
    select from public.credit_ledger as l where l.external_id = v_key
  ) then
    insert into private.welcomed_identities (identity)
    select i.identity from unnest(v_identities) as i (identity)
    on conflict (identity) do nothing;
    get diagnostics v_new = row_count;
    if v_new = cardinality(v_identities) then
      perform private.move_credits(p_user_id, 'grant', v_credits, v_key);
    end if;
  end if;
end;
$$;

-- Definer: sign-up runs as the auth server's role, which has no rights here. No sign-up fails
-- because of us: what cannot be done is noted, and follow_users tries again.
create function private.follow_changed_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.follow_user(new.id);
  return null;
exception when others then
  perform private.note_skipped('follow_user', new.id::text, sqlstate, sqlerrm);
  return null;
end;
$$;

create trigger darkroom_create_entitlement
after insert on auth.users
for each row execute function private.follow_changed_user();

-- At the end of the transaction: Auth says that a guest is permanent before it writes the address.
create constraint trigger darkroom_follow_user
after update on auth.users deferrable initially deferred
for each row execute function private.follow_changed_user();

-- Steps of retention (85).

-- Users whose change could not be followed.
create function private.follow_users(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  select null, private.skip_failing(
    'select count(private.follow_user(u)) from unnest($1) as u',
    array(
      select s.key::uuid from private.skipped_rows as s
      where s.step = 'follow_user' order by s.last_at limit p_at_most
    )
  )
$$;

-- Addresses that were welcomed longer ago than keep_identities.
create function private.trim_identities(
  p_place text, p_at_most integer, out place text, out done integer
)
language sql set search_path = pg_catalog, pg_temp as $$
  with forgotten as (
    delete from private.welcomed_identities as w
    where w.identity = any (array(
      select i.identity from private.welcomed_identities as i
      where i.welcomed_at <= now() - (select s.keep_identities from private.settings as s)
      order by i.welcomed_at limit p_at_most
    ))
    returning 1
  )
  select null, count(*)::integer from forgotten
$$;

-- One user becomes part of another, at once or not at all: credits and debt, bucket by bucket, the
-- paid plan, and what has a user_id. Files stay in the folder they are in. What runs ends for the
-- user it was begun for, so there must be nothing live; and whoever waits for the lock of the one
-- who is merged, to ask for a picture say, finds that user blocked.
--
-- Locks: both entitlements in order of id.
create function public.merge_user(
  from_user_id uuid, to_user_id uuid, allow_permanent boolean default false
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_from public.entitlements;
  v_bucket private.credit_buckets;
  v_rest integer;
  v_generations integer := 0;
  v_is_new boolean;
begin
  perform private.require_writable();
  if (from_user_id <> to_user_id) is not true then
    perform private.refuse_input('from_user_id, to_user_id: not two users');
  end if;
  perform from public.entitlements as e
  where e.user_id in (from_user_id, to_user_id) order by e.user_id for update;
  v_is_new := private.owner_of(from_user_id) = from_user_id;
  select * into v_from from public.entitlements as e where e.user_id = from_user_id;
  if not v_is_new and private.owner_of(from_user_id) <> private.owner_of(to_user_id) then
    perform private.refuse(
      'idempotency_conflict', 'from_user_id: was merged into another user', 'Nothing was changed.'
    );
  elsif not exists (
    select from public.entitlements as e where e.user_id = private.owner_of(to_user_id)
  ) or (v_is_new and v_from.user_id is null) then
    perform private.refuse_missing(
      'from_user_id, to_user_id: no such user', 'Use the ids of auth.users.'
    );
  elsif v_is_new then
    if private.owner_of(to_user_id) <> to_user_id then
      perform private.refuse_input('to_user_id: was merged into another user');
    elsif not v_from.is_guest and allow_permanent is not true then
      perform private.refuse_input(
        'from_user_id: no guest', 'Pass allow_permanent if that account is to end.'
      );
    elsif exists (select from private.live_jobs as j where j.user_id = from_user_id) then
      perform private.refuse(
        'not_finished', 'from_user_id: jobs are queued or running',
        'Wait for their end, or cancel them first.'
      );
    end if;
    insert into private.merged_users (user_id, into_id) values (from_user_id, to_user_id);
    update private.merged_users as m set into_id = to_user_id where m.into_id = from_user_id;
    perform private.end_credits(array[from_user_id]);
    for v_bucket in
      select * from private.credit_buckets as b where b.user_id = from_user_id order by b.id
    loop
      if v_bucket.credits > 0 then
        perform private.book(from_user_id, 'adjust', -v_bucket.credits, v_bucket.id);
      end if;
      update private.credit_buckets set user_id = to_user_id where id = v_bucket.id;
      if v_bucket.credits > 0 then
        perform private.book(
          to_user_id, 'adjust', v_bucket.credits, v_bucket.id,
          p_external_id => format('merge:%s:%s', from_user_id, v_bucket.id)
        );
      end if;
    end loop;
    select e.credits - e.debt into v_rest
    from public.entitlements as e where e.user_id = from_user_id;
    if v_rest <> 0 then
      perform private.move_credits(from_user_id, 'adjust', -v_rest, 'merge:' || from_user_id);
      perform private.move_credits(
        to_user_id, 'adjust', v_rest, format('merge:%s:rest', from_user_id)
      );
    end if;
    update private.billing_customers as c set user_id = to_user_id where c.user_id = from_user_id;
    update private.billing_purchases as p set user_id = to_user_id where p.user_id = from_user_id;
    -- What set_paid said is one row of each user.
    with said as (
      delete from private.billing_subscriptions as b
      where b.subscription = from_user_id::text and b.provider = 'set_paid' returning b.*
    )
    insert into private.billing_subscriptions as b (
      provider, subscription, user_id, owned_since, paid_until, happened_at
    )
    select 'set_paid', to_user_id::text, to_user_id, s.owned_since, s.paid_until, s.happened_at
    from said as s
    on conflict (subscription, provider) do update set
      paid_until = greatest(b.paid_until, excluded.paid_until),
      happened_at = greatest(b.happened_at, excluded.happened_at);
    update private.billing_subscriptions as b set user_id = to_user_id
    where b.user_id = from_user_id;
    update private.billing_events as b set user_id = to_user_id where b.user_id = from_user_id;
    perform private.refresh_plan(u.id) from unnest(array[from_user_id, to_user_id]) as u (id);
    update public.entitlements as e set blocked_until = 'infinity' where e.user_id = from_user_id;
    -- A key that both have used is that of the one who stays.
    update public.batches as b set user_id = to_user_id, idempotency_key = case
      when not exists (
        select from public.batches as o
        where o.user_id = to_user_id and o.idempotency_key = b.idempotency_key
      ) then b.idempotency_key
    end
    where b.user_id = from_user_id;
    update public.generations as g set user_id = to_user_id, idempotency_key = case
      when not exists (
        select from public.generations as o
        where o.user_id = to_user_id and o.idempotency_key = g.idempotency_key
      ) then g.idempotency_key
    end
    where g.user_id = from_user_id;
    get diagnostics v_generations = row_count;
    update public.images as i
    set user_id = to_user_id, merged_from = coalesce(i.merged_from, from_user_id)
    where i.user_id = from_user_id;
  end if;
  return (
    select json_build_object(
      'user_id', e.user_id, 'generations', v_generations, 'applied', v_is_new,
      'credits', private.spendable_credits(e)
    )
    from public.entitlements as e where e.user_id = private.owner_of(to_user_id)
  );
end;
$$;

comment on function public.merge_user is
  'Makes a guest part of another user, with credits, history and files, once. The guest is blocked '
  'from then on and may be deleted; what is granted to it goes to the other. allow_permanent says '
  'that the one who is merged may be no guest. Answers {user_id (who has all of it), '
  'generations (moved now), credits, applied}. Errors: PT400 invalid_input, PT404 not_found, PT409 '
  'not_finished (the guest''s jobs are queued or running: ask again later) | idempotency_conflict '
  '(was merged into another).';
