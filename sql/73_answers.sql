-- What to send to a provider, and what its answer means. Nothing here writes: try it with select.
--
-- docs/providers.md explains recipes by example. A place is {{name}} or {{name.of.a.part}}. What is
-- filled in is not looked through again, so what users write names no place.

-- A JSON template with its places filled from p_values. A text that is nothing but a place becomes
-- the value itself, of whatever type; within a text it is written out.
create function private.fill(p_template jsonb, p_values jsonb) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg(part.text || case
    when place.is_whole then coalesce((p_values #> place.path)::text, 'null')
    when place.path is not null
      then regexp_replace(to_jsonb(coalesce(p_values #>> place.path, ''))::text, '^"|"$', '', 'g')
    else ''
  end, '' order by part.n)::jsonb
  from regexp_split_to_table(p_template::text, '"\{\{[\w.]+\}\}"|\{\{[\w.]+\}\}')
  with ordinality as part (text, n)
  left join (
    select m.n, m.of[1] like '"%' as is_whole, string_to_array(btrim(m.of[1], '"{}'), '.') as path
    from regexp_matches(p_template::text, '"\{\{[\w.]+\}\}"|\{\{[\w.]+\}\}', 'g')
    with ordinality as m (of, n)
  ) as place on place.n = part.n
$$;

-- The same for an address. A place at its start may be an address by itself; others are encoded.
create function private.fill_url(p_template text, p_values jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select string_agg(part.text || case
    when part.n = 1 and part.text = '' then coalesce(p_values #>> place.path, '')
    else coalesce((
      select string_agg(case
        when c.char ~ '[A-Za-z0-9._~/-]' then c.char
        else upper(regexp_replace(encode(convert_to(c.char, 'utf8'), 'hex'), '(..)', '%\1', 'g'))
      end, '' order by c.at)
      from regexp_split_to_table(p_values #>> place.path, '') with ordinality as c (char, at)
    ), '')
  end, '' order by part.n)
  from regexp_split_to_table(p_template, '\{\{[\w.]+\}\}') with ordinality as part (text, n)
  left join (
    select m.n, string_to_array(btrim(m.of[1], '{}'), '.') as path
    from regexp_matches(p_template, '\{\{[\w.]+\}\}', 'g') with ordinality as m (of, n)
  ) as place on place.n = part.n
$$;

create function private.build_request(
  p_provider text, p_step text, p_values jsonb
) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select case jsonb_typeof(p.recipe -> p_step)
    when 'array' then jsonb_agg(r.request order by s.n)
    else (array_agg(r.request))[1]
  end
  from private.providers as p
  cross join lateral (
    select p_values || coalesce(p.recipe -> 'places', '{}')
      || jsonb_build_object('base', p.base_url) as values
  ) as v
  cross join lateral jsonb_path_query(p.recipe -> p_step, '$[*]')
    with ordinality as s (step, n)
  cross join lateral (
    select jsonb_build_object(
      'method', coalesce(s.step ->> 'method', 'GET'),
      'url', private.fill_url(s.step ->> 'url', v.values),
      'headers', private.fill(
        coalesce(p.recipe -> 'headers', '{}') || coalesce(s.step -> 'headers', '{}'),
        v.values || '{"secret": "{{secret}}"}'
      ),
      'body', private.fill(s.step -> 'body', v.values),
      'seconds', s.step -> 'seconds_at_most'
    ) as request
  ) as r
  where p.name = p_provider
  group by p.recipe
$$;

comment on function private.build_request is
  'What to send to a provider for a step of its recipe: {method, url, headers, body, seconds}; null '
  'if the recipe has no such step. Places are filled from p_values, but for {{secret}} in headers, '
  'which the worker puts in. A step that takes several requests gives an array of them.';

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

-- What a provider's words about a failure mean: a code, or null where no row knows them.
create function private.what_words_mean(p_provider text, p_words text) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
  select w.code from private.provider_words as w
  where (w.provider is null or w.provider = p_provider) and p_words ~* w.pattern
  order by w.place limit 1
$$;

-- Percent of the whole that the last progress bar in a log shows, as tqdm draws them:
-- " 50%|█████     | 2/4 [00:01<00:01, ...". Bars with words before are of downloads and the like.
-- Most models draw one bar for each image.
create function private.percent_in(p_logs text, p_images integer) returns integer
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select least(100, (100 * (b.bars - 1 + b.share) / greatest(b.bars, p_images))::integer)
  from (
    select
      count(*) filter (where d.is_new) as bars,
      (array_agg(d.done / d.total order by d.n desc))[1] as share
    from (
      select m.n, m.bar[1]::numeric as done, m.bar[2]::numeric as total, coalesce(
        m.bar[1]::numeric < lag(m.bar[1]::numeric) over (order by m.n)
        or m.bar[2] <> lag(m.bar[2]) over (order by m.n), true
      ) as is_new
      from regexp_matches(
        right(p_logs, 20000), '(?:^|[\r\n]) *\d{1,3}%\|[^|\r\n]*\| *(\d{1,9})/(0*[1-9]\d{0,8}) \[', 'g'
      ) with ordinality as m (bar, n)
    ) as d
  ) as b
  where b.bars > 0
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
  v_is text;
  v_words text;
  v_code text;
begin
  if p_status between 200 and 299 is not true then
    v_words := array_to_string(private.at(p_body, v_recipe -> 'error_words'), '; ');
    v_code := case
      when p_status = 0 or p_status = 429 then 'provider_busy'
      when p_status in (401, 402, 403) then 'provider_refused'
      when p_status between 300 and 599 then coalesce((
        select coalesce(
          e.value ->> 'code', private.what_words_mean(p_provider, v_words), 'provider_error'
        )
        from jsonb_array_elements(v_recipe -> 'errors') with ordinality as e (value, n)
        where (e.value ->> 'step' = p_step) is not false
          and private.at(p_body, e.value -> 'path') <> '{}'
        order by e.n limit 1
      ), case
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
        p_headers ->> 'retry-after', (private.at(p_body, v_recipe -> 'retry_after'))[1] #>> '{}'
      )
    ));
  elsif p_step = 'find' then
    return jsonb_build_object(
      'is', 'found',
      'ids', array(
        select i.id
        from unnest(private.at(p_body, v_step -> 'items', p_vars)) with ordinality as item (value, n)
        cross join lateral (
          select (private.at(item.value, v_step -> 'item_id'))[1] #>> '{}' as id
        ) as i
        where (private.at(item.value, v_step -> 'item_input'))[1] = p_vars -> 'input'
          and i.id ~ '^[\w.:-]{1,200}$'
        order by item.n desc
      ),
      'is_alive', coalesce(p_vars -> 'id' = any (private.at(p_body, v_step -> 'alive')), false),
      'next', (private.at(p_body, v_step -> 'next'))[1]
    );
  end if;
  v_outputs := private.at(p_body, v_step -> 'outputs');
  v_is := case
    when p_step = 'result' or p_step = 'create' and v_outputs <> '{}' then 'done'
    when p_step = 'create' then 'accepted'
    when private.at(p_body, v_step -> 'failed_if') <> '{}' then 'failed'
    when private.at(p_body, v_step -> 'gone_if') <> '{}' then 'gone'
    when private.at(p_body, v_step -> 'missing_if') <> '{}' then 'missing'
    else coalesce(
      v_step -> 'states' ->> ((private.at(p_body, v_step -> 'state'))[1] #>> '{}'), 'running'
    )
  end;
  if v_is in ('failed', 'stopped', 'moderated') then
    v_words := array_to_string(private.at(p_body, v_step -> 'words'), '; ');
    v_code := case v_is
      when 'failed' then coalesce(private.what_words_mean(p_provider, v_words), 'provider_error')
      when 'stopped' then 'provider_error'
      else v_is
    end;
  end if;
  return jsonb_strip_nulls(jsonb_build_object(
    'is', case when v_code is null then v_is else 'failed' end,
    'code', v_code,
    'reason', case when v_code is not null then p_step || ': ' || v_is end,
    'detail', left(v_words, 2000),
    'is_billed', case when v_is = 'failed' then false end,
    'id', (private.at(p_body, v_step -> 'id'))[1] #>> '{}',
    'handles', case when v_is = 'accepted' then (
      select jsonb_object_agg(h.key, (private.at(p_body, h.value))[1])
      from jsonb_each(v_step -> 'handles') as h
    ) end,
    'outputs', case
      when v_is <> 'done' or p_step = 'poll' and v_recipe ? 'result' then null
      when v_step ? 'output_url' then (
        select jsonb_agg(private.fill_url(v_step ->> 'output_url', o.value || p_vars) order by o.n)
        from unnest(v_outputs) with ordinality as o (value, n)
      )
      else to_jsonb(v_outputs)
    end,
    'percent', (private.at(p_body, v_step -> 'percent'))[1],
    'logs', (private.at(p_body, v_step -> 'logs'))[1] #>> '{}',
    'seconds', (private.at(p_body, v_step -> 'seconds'))[1],
    'images', (private.at(p_body, v_step -> 'images'))[1],
    'cost_usd', (private.at(p_body, v_step -> 'cost_usd'))[1]
  ));
end;
$$;

comment on function private.read_answer is
  'What an answer means, as far as it can be known from itself. p_status 0: nothing was sent; null: '
  'no answer came; p_vars is what build_request was given. Answers {is, …}: accepted (it will be '
  'made: id, handles); running (percent, logs); done (outputs, unless the step result fetches '
  'them); failed (code of error_codes, reason without and detail with the provider''s words, '
  'is_billed where known); gone (nothing is left of it); missing (it may be gone); again (no answer '
  'to speak of, after retry_after if it says); unsure (of a create: it may have been bought); found '
  '(ids of what was created from the input, oldest first; is_alive; next page). With seconds, '
  'images and cost_usd where the provider says them.';
