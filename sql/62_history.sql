-- The history of a user, page by page.
--
-- No page costs more than a walk over 200 ids and a look at each, however long the history and rare
-- what is asked for. Ids are in the order of time, so the last one of a page is where the next
-- begins, whatever was added or deleted meanwhile.

-- A tag as it is kept: lower case, single spaces, one way to write an accent.
--
-- Raises: PT400 invalid_input.
create function private.read_tag(p_field text, p_tag text) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_tag text;
begin
  if octet_length(p_tag) <= 800 then
    v_tag := normalize(lower(btrim(regexp_replace(p_tag, '\s+', ' ', 'g'))), nfc);
  end if;
  if private.is_blank(v_tag) or length(v_tag) > 50 then
    perform private.refuse_input(p_field || ': not 1 to 50 characters');
  end if;
  return v_tag;
end;
$$;

-- Raises PT400 invalid_input unless a page may have so many entries.
create function private.check_page_size(p_page_size integer) returns void
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  if (p_page_size between 1 and 100) is not true then
    perform private.refuse_input('page_size: not between 1 and 100');
  end if;
end;
$$;

-- What the walk names and the page leaves out (deleted, of another status) is passed over; the next
-- page begins where the walk or the page ended.
--
-- Raises: PT400 invalid_input, PT401 not_authenticated.
create function private.list_generations(
  p_before uuid, p_page_size integer, p_only_favorites boolean, p_tag text, p_status text
) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan set enable_seqscan = off set enable_bitmapscan = off
set jit = off as $$
declare
  c_walk constant integer := 200;
  v_user_id uuid := private.require_known_user_id();
  v_before uuid := coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  v_tag text := case when p_tag is not null then private.read_tag('tag', p_tag) end;
  v_ids uuid[];
  v_page uuid[];
  v_last_id uuid;
begin
  perform private.check_page_size(p_page_size);
  if p_status not in ('queued', 'processing', 'completed', 'failed', 'canceled') then
    perform private.refuse_input(
      'status: not one of queued, processing, completed, failed, canceled'
    );
  end if;
  -- The ids, newest first, in the order of an index.
  if v_tag is not null then
    v_ids := private.walk_tag(v_user_id, v_tag, v_before, c_walk);
  elsif p_only_favorites then
    v_ids := array(
      select g.id from public.generations as g
      where g.user_id = v_user_id and g.is_favorite and g.id < v_before
      order by g.id desc limit c_walk
    );
  else
    v_ids := array(
      select g.id from public.generations as g
      where g.user_id = v_user_id and g.id < v_before
      order by g.id desc limit c_walk
    );
  end if;
  -- Those that are to be shown, by their key, until the page is full.
  v_page := array(
    select walk.id
    from (
      select w.* from unnest(v_ids) with ordinality as w (id, place) order by w.place
    ) as walk
    cross join lateral (
      select from public.generations as g
      where g.id = walk.id and g.deleted_at is null
        and (p_only_favorites is not true or g.is_favorite)
        and (p_status is null or g.status = p_status)
      limit 1
    ) as found
    order by walk.place limit p_page_size
  );
  v_last_id := case cardinality(v_page)
    when p_page_size then v_page[p_page_size]
    else v_ids[cardinality(v_ids)]
  end;
  return json_build_object(
    'generations', coalesce(array_to_json(private.jobs_json(v_page, v_user_id)), '[]'),
    'next_before', case
      when v_last_id <> v_ids[cardinality(v_ids)] or cardinality(v_ids) = c_walk then v_last_id
    end
  );
end;
$$;
