-- Input: do the params fit the model's schema, and what is the provider sent?
--
-- provider_inputs does all of it before any credit moves: a size in the model's own words, every
-- param held against the schema, defaults under it, the operator's own values over it, then the
-- prompt and a seed of each job. The generation keeps both what was asked (input) and what is sent
-- (provider_input).

-- Why a value does not fit a property of a schema, with what is allowed; null if it does. Beyond
-- 2^53 JSON numbers are not exact.
create function private.input_problem(p_value jsonb, p_rules jsonb) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := p_rules ->> 'type';
  v_least numeric;
  v_most numeric;
  v_size numeric;
begin
  if p_value = 'null' and p_rules @> '{"nullable": true}' then
    return null;
  elsif p_rules ? 'anyOf' then
    return case when (
      select bool_and(private.input_problem(p_value, o.value) is not null)
      from jsonb_array_elements(p_rules -> 'anyOf') as o
    ) then 'none of its types: ' || left(p_rules ->> 'anyOf', 1000) end;
  elsif jsonb_typeof(p_value) is distinct from replace(v_type, 'integer', 'number')
    or (v_type = 'integer' and p_value::numeric % 1 <> 0) then
    return 'not of type ' || coalesce(v_type, 'allowed here');
  elsif p_rules ? 'enum' and not (p_rules -> 'enum') @> jsonb_build_array(p_value) then
    return 'not one of ' || left(p_rules ->> 'enum', 1000);
  elsif v_type in ('integer', 'number') then
    v_least := coalesce((p_rules ->> 'minimum')::numeric, -9007199254740991);
    v_most := coalesce((p_rules ->> 'maximum')::numeric, 9007199254740991);
    v_size := p_value::numeric;
    if v_size not between v_least and v_most then
      return format('not between %s and %s', v_least, v_most);
    elsif p_rules ?| '{exclusiveMinimum,exclusiveMaximum,multipleOf}' then
      return case
        when v_size <= (p_rules ->> 'exclusiveMinimum')::numeric
          then 'not above ' || (p_rules ->> 'exclusiveMinimum')
        when v_size >= (p_rules ->> 'exclusiveMaximum')::numeric
          then 'not below ' || (p_rules ->> 'exclusiveMaximum')
        when v_size % (p_rules ->> 'multipleOf')::numeric <> 0
          then 'not a multiple of ' || (p_rules ->> 'multipleOf')
      end;
    end if;
  elsif v_type = 'string' and p_rules ?| '{maxLength,minLength}' then
    v_size := length(p_value #>> '{}');
    return case
      when v_size > (p_rules ->> 'maxLength')::numeric
        then format('longer than %s characters', p_rules ->> 'maxLength')
      when v_size < (p_rules ->> 'minLength')::numeric
        then format('shorter than %s characters', p_rules ->> 'minLength')
    end;
  elsif v_type = 'array' then
    v_most := coalesce((p_rules ->> 'maxItems')::numeric, 16);
    v_size := jsonb_array_length(p_value);
    return case
      when v_size > v_most then format('longer than %s items', v_most)
      when v_size < (p_rules ->> 'minItems')::numeric
        then format('shorter than %s items', p_rules ->> 'minItems')
      else (
        select 'an item is ' || q.problem
        from jsonb_array_elements(p_value) with ordinality as i (value, place)
        cross join private.input_problem(i.value, p_rules -> 'items') as q (problem)
        where q.problem is not null order by i.place limit 1
      )
    end;
  end if;
  return null;
end;
$$;

-- The params with a size the model knows in place of one it does not: the nearest of its own ratios
-- or sizes (shape counts before area), or pixels of that shape, with the area of its defaults, in
-- the nearest steps it allows. What cannot be mapped stays as it is, for its schema to refuse.
create function private.map_size(p_model public.models, p_params jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_takes_pixels boolean := p_model.client_inputs @> '{width,height}';
  v_sides numeric[] := array(
    select s.side from unnest('{width,height}'::text[]) with ordinality as n (name, place)
    cross join lateral (
      select case jsonb_typeof(p_params -> n.name) when 'number' then (p_params ->> n.name)::numeric
      end as side
    ) as s
    where s.side % 1 = 0 and s.side between 1 and 16384 order by n.place
  );
  v_ratio numeric[] := regexp_match(
    p_params ->> 'aspect_ratio', '^0*([1-9]\d{0,3}):0*([1-9]\d{0,3})$'
  )::numeric[];
  v_unknown text[] := array['aspect_ratio'];
  v_size jsonb;
begin
  if cardinality(v_sides) = 2 and not v_takes_pixels then
    v_ratio := v_sides;
    v_unknown := array['width', 'height'];
  elsif v_ratio is null or 'aspect_ratio' = any (p_model.client_inputs) then
    if cardinality(v_sides) = 2 then
      -- Some models look at pixels only when asked for a custom shape.
      select coalesce(jsonb_object_agg(c.name, 'custom'), '{}') into v_size
      from unnest('{aspect_ratio,size}'::text[]) as c (name)
      where v_properties #> array[c.name, 'enum'] @> '["custom"]';
    end if;
    return coalesce(v_size, '{}') || p_params;
  end if;
  if v_takes_pixels then
    select jsonb_object_agg(s.name, coalesce(
      (
        select e.value::numeric from jsonb_array_elements(r.rules -> 'enum') as e
        order by abs(e.value::numeric - s.pixels) limit 1
      ),
      least(
        floor(coalesce((r.rules ->> 'maximum')::numeric, 2048) / r.step) * r.step,
        greatest(
          ceil(coalesce((r.rules ->> 'minimum')::numeric, 64) / r.step) * r.step,
          round(s.pixels / r.step) * r.step
        )
      )
    )) into v_size
    from (
      select coalesce((v_properties #>> '{width,default}')::numeric, 1024)
        * coalesce((v_properties #>> '{height,default}')::numeric, 1024) as area
    ) as a
    cross join lateral (values
      ('width', sqrt(a.area * v_ratio[1] / v_ratio[2])),
      ('height', sqrt(a.area * v_ratio[2] / v_ratio[1]))
    ) as s (name, pixels)
    cross join lateral (
      -- Multiples of 64, as diffusion models like them.
      select v_properties -> s.name as rules, case
        when 64 % coalesce((v_properties #>> array[s.name, 'multipleOf'])::numeric, 1) = 0 then 64
        else (v_properties #>> array[s.name, 'multipleOf'])::numeric
      end as step
    ) as r;
  else
    select jsonb_build_object(p.name, o.option) into v_size
    from unnest('{aspect_ratio,size,image_size,resolution}'::text[])
      with ordinality as p (name, place)
    cross join jsonb_array_elements_text(
      coalesce(v_properties #> array[p.name, 'enum'], '[]')
    ) as o (option)
    cross join regexp_match(o.option, '^(\d{1,5}) ?[:x*×] ?(\d{1,5})$') as m
    where p.name = any (p_model.client_inputs) and m[1]::numeric > 0 and m[2]::numeric > 0
    order by
      p.place,
      abs(ln(m[1]::numeric / m[2]::numeric) - ln(v_ratio[1] / v_ratio[2])),
      abs(ln(m[1]::numeric * m[2]::numeric) - ln(v_ratio[1] * v_ratio[2]))
    limit 1;
  end if;
  return case when v_size is null then p_params else v_size || (p_params - v_unknown) end;
end;
$$;

-- A source image is a file in the user's own folder of bucket inputs, given by its path, or a
-- finished picture of the user's own, given as generations/<its path>. An address is none. What a
-- file may be named is for Storage to say: it has the file or not.
--
-- Raises: PT400 invalid_input.
create function private.check_source_images(
  p_model public.models, p_user_id uuid, p_params jsonb
) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
  v_problem text;
begin
  select i.name, q.problem into v_name, v_problem
  from unnest(p_model.image_inputs) as i (name)
  cross join jsonb_path_query(p_params -> i.name, 'lax $[*]') as v (source)
  cross join regexp_match(v.source #>> '{}', '^(?:(generations|inputs)/)?(.*)$') as p (part)
  cross join lateral (
    select case
      when p.part[1] = 'generations' then case when not exists (
        select from public.images as m
        inner join public.generations as g on g.id = m.generation_id
        where m.generation_id = private.path_id(p.part[2], 2) and m.storage_path = p.part[2]
          and m.user_id = p_user_id and g.deleted_at is null
      ) then 'no finished picture of yours' end
      when not (starts_with(p.part[2], p_user_id || '/') and private.is_plain_path(p.part[2]))
        then 'not a path in your folder of bucket inputs'
      when to_regclass('storage.objects') is not null
        and private.file_changed_at('inputs', p.part[2]) is null
        then 'no such file in bucket inputs'
    end as problem
  ) as q
  where v.source <> 'null' and q.problem is not null
  limit 1;
  if found then
    perform private.refuse_input(format('params.%s: %s', v_name, v_problem), format(
      'Upload the picture to inputs as %s/<name> and give that path, or give generations/<path> of '
      'a picture you have made.', p_user_id
    ));
  end if;
end;
$$;

-- There is nothing to see in a text, or no text: it is of controls, spaces, format characters,
-- fillers, variation selectors, tags and marks without a letter. By number, for what the classes of
-- a regular expression hold depends on the locale.
create function private.is_blank(p_text text) returns boolean
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return p_text !~ (
    '[^\u0001-\u0020\u007f-\u00a0\u00ad\u0300-\u036f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891'
    '\u08e2\u115f\u1160\u1680\u17b4\u17b5\u180b-\u180f\u1ab0-\u1aff\u1dc0-\u1dff\u2000-\u200f'
    '\u2028-\u202f\u205f-\u206f\u20d0-\u20ff\u2800\u3000\u3164\ufe00-\ufe0f\ufe20-\ufe2f\ufeff'
    '\uffa0\ufff0-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U00016fe4'
    '\U0001bca0-\U0001bca3\U0001d159\U0001d173-\U0001d17a\U000e0000-\U000e0fff]'
  ) is not false;
end;
$$;

-- What the provider is sent for each prompt. A seed is chosen where the model has one and nobody
-- said it, so that every picture can be made again. It also marks the job: a lost create is found
-- at the provider by its input. params.reuse is ours, not the model's: see enqueue_generation (50).
-- p_field is what a refusal calls a prompt, with its place for %1$s.
--
-- Raises: PT400 invalid_input, naming the field and what is allowed.
create function private.provider_inputs(
  p_model public.models, p_user_id uuid, p_params jsonb, p_prompts text[],
  p_field text default 'prompt'
) returns jsonb[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := p_params;
  v_rules jsonb := p_model.input_schema -> 'properties';
  v_prompt_rules jsonb;
  v_name text;
  v_problem text;
  v_inputs jsonb[];
begin
  if v_params - p_model.client_inputs <> '{}' or v_params ? 'aspect_ratio'
    or v_params ?& '{width,height}' or v_params ?| p_model.image_inputs then
    if jsonb_typeof(v_params -> 'reuse') <> 'boolean' then
      perform private.refuse_input('params.reuse: not of type boolean');
    elsif v_params @> '{"reuse": true}' and not v_params ? 'seed' then
      perform private.refuse_input(
        'params.reuse: needs params.seed', 'Without a seed every picture is another one.'
      );
    end if;
    v_params := private.map_size(p_model, v_params - 'reuse');
    v_name := (
      select min(f.name) from jsonb_object_keys(v_params - p_model.client_inputs) as f (name)
    );
    if v_name is not null then
      perform private.refuse_input(
        format('params.%s: not an input of %s', left(v_name, 60), p_model.id),
        'Allowed: ' || array_to_string(p_model.client_inputs, ', ')
      );
    end if;
  end if;
  foreach v_name in array p_model.client_inputs loop
    -- A plain number, what is asked most, costs no call.
    if (case when v_params ? v_name then (
      jsonb_typeof(v_params -> v_name) = 'number' and (v_params -> v_name)::numeric % 1 = 0
      and (v_rules -> v_name) - '{default,maximum,minimum}'::text[] = '{"type": "integer"}'
      and v_params -> v_name >= v_rules -> v_name -> 'minimum'
      and v_params -> v_name <= v_rules -> v_name -> 'maximum'
    ) is not true else v_name = any (p_model.required_inputs) end) then
      v_problem := case when v_params ? v_name
        then private.input_problem(v_params -> v_name, v_rules -> v_name) else 'missing'
      end;
      if v_problem is not null then
        perform private.refuse_input(format('params.%s: %s', v_name, v_problem));
      end if;
    end if;
  end loop;
  if v_params ?| p_model.image_inputs then
    perform private.check_source_images(p_model, p_user_id, v_params);
  end if;
  v_params := p_model.default_input || v_params || p_model.operator_input;
  for v_at in 1 .. cardinality(p_prompts) loop
    if (
      p_prompts[v_at] ~ '[0-9A-Za-z]'
      and (v_rules -> p_model.prompt_input) - 'default'::text = '{"type": "string"}'
    ) is not true then
      v_prompt_rules := v_rules -> p_model.prompt_input;
      if not private.is_blank(p_prompts[v_at]) then
        v_problem := case when v_prompt_rules ?| '{anyOf,enum,maxLength,minLength}'
          then private.input_problem(to_jsonb(p_prompts[v_at]), v_prompt_rules)
        end;
      -- One that needs a picture and has a prompt of its own, an upscaler say, does without.
      elsif p_model.prompt_input is null or (
        p_model.input_schema -> 'required' ?| p_model.image_inputs
        and not p_model.input_schema -> 'required' ? p_model.prompt_input
        and v_prompt_rules ? 'default'
      ) then
        p_prompts[v_at] := null;
      else
        v_problem := 'missing or blank';
      end if;
      if v_problem is not null then
        perform private.refuse_input(format(p_field || ': %2$s', v_at - 1, v_problem));
      end if;
    end if;
    v_inputs[v_at] := v_params || case
      when p_model.prompt_input is not null and p_prompts[v_at] is not null
        then jsonb_build_object(p_model.prompt_input, p_prompts[v_at])
      else '{}'
    end || case
      when p_model.highest_seed is not null and not v_params ? 'seed'
        then jsonb_build_object('seed', p_model.lowest_seed + floor(
          random() * (p_model.highest_seed - p_model.lowest_seed + 1)
        )::bigint)
      else '{}'
    end;
  end loop;
  return v_inputs;
end;
$$;
