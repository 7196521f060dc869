-- Who is told: webhook endpoints, which the operator's backend keeps, and push tokens, which apps
-- register for their user; and what the operator sees of the outbox.
--
-- An endpoint's address is called from inside the operator's network, so what could mean something
-- in there is refused: here by its words, and by the worker again by the addresses the name has at
-- the moment of connecting. settings.webhook_allows_private lets all of it in, for development.

-- Whether a host is an IP address, in its one proper form, that anybody on the internet can reach.
create function private.is_public_address(p_host text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_address inet;
begin
  v_address := btrim(p_host, '[]')::inet;
  if family(v_address) = 4 then
    -- Also relays of 6to4, and the address of Azure's agent, which is public by its number only.
    return host(v_address) = p_host and not v_address <<= any (
      '{0.0.0.0/8,10.0.0.0/8,100.64.0.0/10,127.0.0.0/8,168.63.129.16,169.254.0.0/16,172.16.0.0/12,'
      '192.0.0.0/24,192.0.2.0/24,192.88.99.0/24,192.168.0.0/16,198.18.0.0/15,198.51.100.0/24,'
      '203.0.113.0/24,224.0.0.0/3}'::inet[]
    );
  end if;
  -- Teredo, documentation, 6to4: all of it either goes nowhere or wraps another address.
  return v_address <<= '2000::/3' and not v_address <<= any (
    '{2001::/23,2001:db8::/32,2002::/16,3fff::/20}'::inet[]
  );
exception
  when invalid_text_representation then
    return false;
end;
$$;

-- Why a host of an address must not be called; null if it may. A name's last label begins with a
-- letter: whatever else ends in a number is an IP address to those who connect, in one of its many
-- spellings (0x7f000001, 127.0.0.0x1).
create function private.host_problem(p_host text) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case
    when p_host ~ '^(\[|[0-9.]+$)' then case
      when not private.is_public_address(p_host) then 'not a public address'
    end
    when p_host !~ '^([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z][a-z0-9-]{0,61}[a-z0-9]$'
      or length(p_host) > 253 then 'not a full host name'
    when p_host ~ '\.(localhost|localdomain|local|internal|intranet|lan|home|corp|arpa|test|onion)$'
      then 'a name of a private network'
  end
$$;

-- Raises: PT400 invalid_input.
create function private.check_webhook_url(p_url text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_allows_private boolean := (select webhook_allows_private from private.settings);
  -- Scheme, host, port, and the rest: no user, no password, no fragment.
  v_parts text[] := regexp_match(
    p_url,
    '^(https?)://(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?(?:[/?][!"$-\[\]-~]*)?$',
    'i'
  );
  v_problem text;
begin
  if v_parts is null or length(p_url) > 2000 or v_parts[3]::integer not between 1 and 65535 then
    perform private.refuse_input(
      'url: not an address', 'Send one such as https://api.example.com/hooks/darkroom.'
    );
  elsif v_allows_private then
    return;
  elsif lower(v_parts[1]) <> 'https' then
    perform private.refuse_input('url: not https');
  elsif v_parts[3]::integer < 1024 and v_parts[3]::integer <> 443 then
    perform private.refuse_input('url: neither port 443 nor one from 1024 on');
  end if;
  v_problem := private.host_problem(lower(v_parts[2]));
  if v_problem is not null then
    perform private.refuse_input(
      'url: ' || v_problem, 'For development see private.settings.webhook_allows_private.'
    );
  end if;
end;
$$;

-- An endpoint as the API shows it: never with its secret.
create function private.webhook_json(p_endpoint private.webhook_endpoints) returns json
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'webhook_id', p_endpoint.id,
    'url', p_endpoint.url,
    'events', p_endpoint.events,
    'description', p_endpoint.description,
    'created_at', p_endpoint.created_at,
    'disabled_at', p_endpoint.disabled_at
  )
$$;

-- Raises: PT400 invalid_input.
create function private.register_webhook(
  p_url text, p_events text[], p_description text
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_all text[] := '{generation.completed,generation.failed,generation.canceled}'::text[];
  v_events text[] := coalesce(p_events, v_all);
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  perform private.check_webhook_url(coalesce(p_url, ''));
  if cardinality(v_events) not between 1 and 3 or not v_events <@ v_all then
    perform private.refuse_input('events: not some of ' || array_to_string(v_all, ', '));
  elsif p_description <> '' and private.is_blank(p_description) then
    perform private.refuse_input('description: blank');
  elsif length(p_description) > 200 then
    perform private.refuse_input('description: longer than 200 characters');
  elsif (select count(*) from private.webhook_endpoints) >= 20 then
    perform private.refuse_input('url: there are 20 webhooks', 'Delete one first.');
  end if;
  insert into private.webhook_endpoints (url, events, description)
  values (p_url, v_events, coalesce(p_description, ''))
  returning * into v_endpoint;
  return json_build_object('webhook_id', v_endpoint.id, 'secret', v_endpoint.secret);
end;
$$;

create function private.list_webhooks() returns json
language sql stable security definer set search_path = pg_catalog, pg_temp as $$
  select coalesce(json_agg(private.webhook_json(w) order by w.id), '[]')
  from private.webhook_endpoints as w
$$;

-- The endpoint that an update or delete met. Raises: PT404 not_found.
create function private.found_webhook(
  p_endpoint private.webhook_endpoints
) returns private.webhook_endpoints
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if p_endpoint.id is null then
    perform private.refuse_missing('webhook_id: no such webhook', 'list_webhooks() shows them.');
  end if;
  return p_endpoint;
end;
$$;

-- Raises: PT404 not_found.
create function private.delete_webhook(p_webhook_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  -- Deliveries first, as when one ends with 410. What a job that is just ending adds is buried when
  -- it is due.
  delete from private.deliveries where lane = p_webhook_id::text and state = 'pending';
  delete from private.webhook_endpoints where id = p_webhook_id returning * into v_endpoint;
  return private.webhook_json(private.found_webhook(v_endpoint));
end;
$$;

-- Raises: PT404 not_found.
create function private.enable_webhook(p_webhook_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  update private.webhook_endpoints set disabled_at = null
  where id = p_webhook_id returning * into v_endpoint;
  return private.webhook_json(private.found_webhook(v_endpoint));
end;
$$;

-- Raises: PT404 not_found.
create function private.rotate_webhook_secret(p_webhook_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_endpoint private.webhook_endpoints;
begin
  perform private.require_writable();
  update private.webhook_endpoints set
    secret = private.new_webhook_secret(),
    previous_secret = secret, previous_secret_until = now() + interval '1 day'
  where id = p_webhook_id returning * into v_endpoint;
  v_endpoint := private.found_webhook(v_endpoint);
  return json_build_object(
    'webhook_id', v_endpoint.id, 'secret', v_endpoint.secret,
    'previous_secret_until', v_endpoint.previous_secret_until
  );
end;
$$;
