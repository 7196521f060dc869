-- What to send to a provider, and what its answer means. Nothing here writes: try it with select.
--
-- docs/providers.md explains recipes by example. A place is {{name}} or {{name.of.a.part}}. What is
-- filled in is not looked through again, so what users write names no place.

-- A JSON template with its places filled from p_values. A text that is nothing but a place becomes
-- the value itself, of whatever type; within a text it is written out.
create function private.fill(p_template jsonb, p_values jsonb) returns jsonb
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
declare
  v_filled text := '';
  v_rest text := p_template::text;
  v_place text;
  v_path text[];
begin
  loop
    v_place := substring(v_rest from '"\{\{[\w.]+\}\}"|\{\{[\w.]+\}\}');
    exit when v_place is null;
    v_path := string_to_array(btrim(v_place, '"{}'), '.');
    v_filled := v_filled || left(v_rest, position(v_place in v_rest) - 1) || case
      when v_place like '"%' then coalesce((p_values #> v_path)::text, 'null')
      else regexp_replace(to_jsonb(coalesce(p_values #>> v_path, ''))::text, '^"|"$', '', 'g')
    end;
    v_rest := substr(v_rest, position(v_place in v_rest) + length(v_place));
  end loop;
  return (v_filled || v_rest)::jsonb;
end;
$$;

-- The same for an address. A place at its start may be an address by itself; others are encoded.
create function private.fill_url(p_template text, p_values jsonb) returns text
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
declare
  v_filled text := '';
  v_rest text := p_template;
  v_place text;
  v_value text;
begin
  loop
    v_place := substring(v_rest from '\{\{[\w.]+\}\}');
    exit when v_place is null;
    v_filled := v_filled || left(v_rest, position(v_place in v_rest) - 1);
    v_rest := substr(v_rest, position(v_place in v_rest) + length(v_place));
    v_value := left(coalesce(p_values #>> string_to_array(btrim(v_place, '{}'), '.'), ''), 8000);
    v_filled := v_filled || case
      when v_filled = '' or v_value !~ '[^A-Za-z0-9._~/-]' then v_value
      else (
        select string_agg(case
          when c.char ~ '[A-Za-z0-9._~/-]' then c.char
          else upper(regexp_replace(encode(convert_to(c.char, 'utf8'), 'hex'), '(..)', '%\1', 'g'))
        end, '' order by c.at)
        from regexp_split_to_table(v_value, '') with ordinality as c (char, at)
      )
    end;
  end loop;
  return v_filled || v_rest;
end;
$$;

create function private.requested(p_recipe jsonb, p_step jsonb, p_values jsonb) returns jsonb
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  return jsonb_build_object(
    'method', coalesce(p_step ->> 'method', 'GET'),
    'url', private.fill_url(p_step ->> 'url', p_values),
    'headers', private.fill(
      coalesce(p_recipe -> 'headers', '{}') || coalesce(p_step -> 'headers', '{}'), p_values
    ),
    'body', private.fill(p_step -> 'body', p_values),
    'seconds', p_step -> 'seconds_at_most'
  );
end;
$$;

create function private.build_request(
  p_provider text, p_step text, p_values jsonb
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_provider private.providers := (select p from private.providers as p where p.name = p_provider);
  v_values jsonb := p_values || coalesce(v_provider.recipe -> 'places', '{}')
    || jsonb_build_object('base', v_provider.base_url, 'secret', '{{secret}}');
  v_step jsonb := v_provider.recipe -> p_step;
begin
  if jsonb_typeof(v_step) = 'array' then
    return (
      select jsonb_agg(private.requested(v_provider.recipe, s.step, v_values) order by s.n)
      from jsonb_array_elements(v_step) with ordinality as s (step, n)
    );
  end if;
  return private.requested(v_provider.recipe, v_step, v_values);
end;
$$;

comment on function private.build_request is
  'What to send to a provider for a step of its recipe: {method, url, headers, body, seconds}; '
  'null if the recipe has no such step. Places are filled from p_values, but for {{secret}}, which '
  'the worker puts into headers. A step that takes several requests gives an array of them.';

-- All that is found at one path or, in their order, at several. null paths: nothing is.
create function private.at(p_body jsonb, p_paths jsonb, p_vars jsonb default '{}') returns jsonb[]
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  if jsonb_typeof(p_paths) = 'string' then
    return array(
      select f.value
      from jsonb_path_query(p_body, (p_paths #>> '{}')::jsonpath, p_vars, true) as f (value)
      where f.value <> 'null'
    );
  end if;
  return array(
    select f.value
    from jsonb_array_elements_text(p_paths) with ordinality as p (path, n)
    cross join lateral jsonb_path_query(p_body, p.path::jsonpath, p_vars, true)
      with ordinality as f (value, at)
    where f.value <> 'null' order by p.n, f.at
  );
end;
$$;

-- The same as one text.
create function private.words_at(p_body jsonb, p_paths jsonb) returns text
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select left(string_agg(w.value #>> '{}', '; '), 20000)
    from unnest(private.at(p_body, p_paths)) as w (value)
  );
end;
$$;

-- What a provider's words about a failure mean: a code, or null where no row knows them.
create function private.what_words_mean(p_provider text, p_words text) returns text
language plpgsql stable strict set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select w.code from private.provider_words as w
    where (w.provider is null or w.provider = p_provider) and p_words ~* w.pattern
    order by w.place limit 1
  );
end;
$$;

-- Percent of the whole that the last progress bar in a log shows, as tqdm draws them:
-- " 50%|█████     | 2/4 [00:01<00:01, ...". Bars with words before are of downloads and the like.
-- Most models draw one bar for each image.
create function private.percent_in(p_logs text, p_images integer) returns integer
language plpgsql immutable strict set search_path = pg_catalog, pg_temp as $$
declare
  v_bar text[];
  v_done numeric;
  v_total numeric;
  v_bars integer := 0;
begin
  if position('%|' in p_logs) = 0 then
    return null;
  end if;
  for v_bar in
    select m.bar from regexp_matches(
      right(p_logs, 20000),
      '(?:^|[\r\n]) *\d{1,3}%\|[^|\r\n]*\| *(\d{1,9})/(0*[1-9]\d{0,8}) \[', 'g'
    ) as m (bar)
  loop
    if v_bar[1]::numeric < v_done or v_bar[2]::numeric = v_total is not true then
      v_bars := v_bars + 1;
    end if;
    v_done := v_bar[1]::numeric;
    v_total := v_bar[2]::numeric;
  end loop;
  return least(100, 100 * (v_bars - 1 + v_done / v_total) / greatest(v_bars, p_images))::integer;
end;
$$;

create function private.read_answer(
  p_provider text, p_step text, p_status integer, p_headers jsonb, p_body jsonb,
  p_vars jsonb default '{}'
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_recipe jsonb := (select p.recipe from private.providers as p where p.name = p_provider);
  v_step jsonb := v_recipe -> coalesce(v_recipe -> p_step ->> 'as', p_step);
  v_outputs jsonb[];
  v_percent jsonb;
  v_is text;
  v_words text;
  v_code text;
begin
  if p_status between 200 and 299 is not true then
    v_words := private.words_at(p_body, v_recipe -> 'error_words');
    v_code := case
      when p_status = 0 or p_status = 429 then 'provider_busy'
      when p_status in (401, 402, 403) then 'provider_refused'
      when p_status between 300 and 599 then coalesce((
        select coalesce(
          e.value ->> 'code', private.what_words_mean(p_provider, v_words), 'provider_error'
        )
        from jsonb_array_elements(v_recipe -> 'errors') with ordinality as e (value, n)
        where (e.value ->> 'step' = p_step) is not false
          and private.at(p_body, e.value -> 'path', jsonb_build_object('status', p_status)) <> '{}'
        order by e.n limit 1
      ), case
        when p_step in ('poll', 'find') then null  -- what may be bought is not given up for that
        when p_status in (400, 409, 413, 415, 422)
          then coalesce(private.what_words_mean(p_provider, v_words), 'invalid_input')
        when p_status = 404 and p_step = 'create' then 'model_withdrawn'
        when p_status < 500 and p_status not in (404, 408, 425) then 'internal'
      end)
    end;
    return jsonb_strip_nulls(jsonb_build_object(
      'is', case
        when v_code = 'provider_busy' and p_step <> 'create' then 'again'
        when v_code is not null then 'failed'
        when p_status = 404 and p_step in ('poll', 'result') then 'missing'
        when p_step = 'create' then 'unsure'
        else 'again'
      end,
      'code', v_code,
      'reason', concat(p_step, ': ', coalesce('HTTP ' || nullif(p_status, 0), 'no answer')),
      'detail', left(coalesce(nullif(v_words, ''), p_body #>> '{}'), 2000),
      'retry_after', coalesce(
        private.asked_seconds(p_headers ->> 'retry-after'),
        private.asked_seconds((private.at(p_body, v_recipe -> 'retry_after'))[1] #>> '{}')
      )
    ));
  elsif p_step = 'find' then
    return jsonb_build_object(
      'is', 'found',
      'ids', array(
        select i.id
        from unnest(private.at(p_body, v_step -> 'items', p_vars))
          with ordinality as item (value, n)
        cross join lateral (
          select (private.at(item.value, v_step -> 'item_id'))[1] #>> '{}' as id
        ) as i
        where (private.at(item.value, v_step -> 'item_input'))[1] = p_vars -> 'input'
          and i.id ~ '^[\w.:-]{1,200}$'
        order by item.n desc
      ),
      'is_alive', coalesce(p_vars -> 'id' = any (private.at(p_body, v_step -> 'alive')), false),
      'next', (private.at(p_body, v_step -> 'next'))[1] #>> '{}'
    );
  end if;
  v_is := case
    when p_step = 'result' then 'done'
    when p_step = 'create' and v_step ? 'outputs' then 'done'
    when p_step = 'create' then 'accepted'
    when p_step = 'upload' then 'failed'  -- without the address that was asked for
    when jsonb_path_exists(p_body, (v_step ->> 'failed_if')::jsonpath, '{}', true) then 'failed'
    when jsonb_path_exists(p_body, (v_step ->> 'gone_if')::jsonpath, '{}', true) then 'gone'
    when jsonb_path_exists(p_body, (v_step ->> 'missing_if')::jsonpath, '{}', true) then 'missing'
    else coalesce(
      v_step -> 'states' ->> (
        jsonb_path_query_first(p_body, (v_step ->> 'state')::jsonpath, '{}', true) #>> '{}'
      ), 'running'
    )
  end;
  if v_is = 'done' and v_step ? 'outputs' then
    v_outputs := private.at(
      p_body, coalesce(nullif(p_vars -> 'outputs_path', 'null'), v_step -> 'outputs'), p_vars
    );
    if p_step = 'create' and v_outputs = '{}' then
      v_is := 'accepted';
    end if;
  elsif v_is in ('failed', 'stopped', 'moderated') then
    v_words := private.words_at(p_body, v_step -> 'words');
    v_code := case v_is
      when 'failed' then coalesce(private.what_words_mean(p_provider, v_words), 'provider_error')
      when 'stopped' then 'provider_error'
      else v_is
    end;
  end if;
  v_percent := jsonb_path_query_first(p_body, (v_step ->> 'percent')::jsonpath, '{}', true);
  return jsonb_strip_nulls(jsonb_build_object(
    'is', case when v_code is null then v_is else 'failed' end,
    'code', v_code,
    'reason', case when v_code is not null then p_step || ': ' || v_is end,
    'detail', left(v_words, 2000),
    'is_billed', case when v_is = 'failed' then false end,
    'id', jsonb_path_query_first(p_body, (v_step ->> 'id')::jsonpath, '{}', true) #>> '{}',
    'handles', case when v_is = 'accepted' then (
      select jsonb_object_agg(h.key, (private.at(p_body, h.value))[1])
      from jsonb_each(v_step -> 'handles') as h
    ) end,
    'outputs', case when v_is = 'done' and (p_step = 'result' or not v_recipe ? 'result') then
      coalesce((
        select jsonb_agg(case when v_step ? 'output_url'
          then to_jsonb(private.fill_url(v_step ->> 'output_url', o.value || p_vars))
          else o.value
        end order by o.n)
        from unnest(v_outputs) with ordinality as o (value, n)
        where jsonb_typeof(o.value) = case when v_step ? 'output_url' then 'object' else 'string' end
      ), '[]')
    end,
    'percent', case when jsonb_typeof(v_percent) = 'number'
      then greatest(0, least(100, v_percent::numeric))::integer
    end,
    'logs', jsonb_path_query_first(p_body, (v_step ->> 'logs')::jsonpath, '{}', true) #>> '{}',
    'seconds', jsonb_path_query_first(p_body, (v_step ->> 'seconds')::jsonpath, '{}', true),
    'images', jsonb_path_query_first(p_body, (v_step ->> 'images')::jsonpath, '{}', true),
    'cost_usd', jsonb_path_query_first(p_body, (v_step ->> 'cost_usd')::jsonpath, '{}', true)
  ));
end;
$$;

comment on function private.read_answer is
  'What an answer means, as far as it can be known from itself. p_status 0: nothing was sent; '
  'null: no answer came; p_vars is what build_request was given. Answers {is, …}: accepted (it '
  'will be made: id, handles); running (percent, logs); done (outputs, unless the step result '
  'fetches them); failed (code of error_codes, reason without and detail with the provider''s '
  'words, is_billed where known); gone (nothing is left of it); missing (it may be gone); again '
  '(no answer to speak of: once more, after retry_after if it says); unsure (of a create: it '
  'may have been bought); found (ids of what was created from the input, oldest first; '
  'is_alive; next page). With seconds, images and cost_usd where the provider says them.';
