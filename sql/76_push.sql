-- Push tokens: an app registers its device for its user, and takes it back at sign-out.
--
-- A token is a device's, so it belongs to the user who registered it last: who signs in on a
-- borrowed phone does not leave the news of his jobs there for its owner.

-- Locks: the entitlement row, so that concurrent calls cannot pass the cap.
-- Raises: PT400 invalid_input, PT401 not_authenticated.
create function private.register_push_token(p_token text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
begin
  if p_token is null or p_token !~ '^Expo(nent)?PushToken\[[A-Za-z0-9_-]{1,100}\]$' then
    perform private.refuse_input(
      'token: not an Expo push token', 'Send what getExpoPushTokenAsync() answers.'
    );
  end if;
  perform private.lock_entitlement(v_user_id);
  insert into private.push_tokens as t (token, user_id) values (p_token, v_user_id)
  on conflict (token) do update set user_id = excluded.user_id, registered_at = clock_timestamp();
  -- More devices than anybody has: those not heard of longest are forgotten.
  delete from private.push_tokens where token = any (array(
    select t.token from private.push_tokens as t
    where t.user_id = v_user_id order by t.registered_at desc offset 5 for update skip locked
  ));
  return json_build_object('registered', true);
end;
$$;

-- Raises: PT401 not_authenticated.
create function private.unregister_push_token(p_token text) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
begin
  delete from private.push_tokens where token = p_token and user_id = v_user_id;
  return json_build_object('registered', false);
end;
$$;
