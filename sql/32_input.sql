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

-- What a word says of a size: its shape (width / height) and its pixels; null: nothing. "16:9",
-- "1024x768", "landscape_4_3", "square_hd", "2K", "0.25 MP", and the length of a side, "768".
create function private.read_size(p_word text, out shape float8, out area float8)
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_word text := lower(p_word);
  v_sides float8[] := regexp_match(v_word, '(?:^|\D)(\d{1,5}) ?[:x*×_/] ?(\d{1,5})$')::float8[];
  v_number text[] := regexp_match(v_word, '(?:^|_)(\d{1,5}(?:\.\d+)?) ?(k|mp|px?)?$');
begin
  if v_sides[1] > 0 and v_sides[2] > 0 then
    shape := case
      when v_word like '%portrait%' then least(v_sides[1] / v_sides[2], v_sides[2] / v_sides[1])
      else v_sides[1] / v_sides[2]
    end;
    area := case when least(v_sides[1], v_sides[2]) >= 64 then v_sides[1] * v_sides[2] end;
  elsif v_number[1]::float8 > 0 then
    area := case
      when v_number[2] = 'k' then (v_number[1]::float8 * 1024) ^ 2
      when v_number[2] = 'mp' or v_number[1]::float8 < 64 then v_number[1]::float8 * 1000000
      else v_number[1]::float8 ^ 2
    end;
  else
    shape := case substring(v_word from 'square|landscape|portrait')
      when 'square' then 1 when 'landscape' then 1.5 when 'portrait' then 0.67
    end;
    area := case when v_word = 'square' then 512 ^ 2 when shape = 1 then 1024 ^ 2 end;
  end if;
end;
$$;

-- What models call the inputs that take a size or a shape in words. The first of those that a model
-- has counts.
create function private.size_inputs() returns text[]
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return array[
    'aspect_ratio', 'size', 'image_size', 'resolution', 'image_dimensions', 'image_resolution',
    'target_resolution', 'megapixels', 'output_megapixels'
  ];
end;
$$;

-- The size that is sent to a model, in its own inputs.
create function private.size_sent(p_sent jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
begin
  return (
    select coalesce(jsonb_object_agg(s.name, p_sent -> s.name), '{}')
    from unnest('{width,height}'::text[] || private.size_inputs()) as s (name)
    where p_sent ? s.name
  );
end;
$$;

-- The params with the size the model knows that is nearest to the one they ask for, as width and
-- height or as aspect_ratio: shape counts before area. That is pixels within its limits, where it
-- takes them; else a word of its own for a shape, and one for the area. What it takes as it is
-- stays, and what it has no word for is left out: it makes the one size it knows.
create function private.map_size(p_model public.models, p_params jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_names text[] := array['width', 'height'];
  v_takes_pixels boolean := p_model.client_inputs @> v_names;
  v_sides float8[] := case
    when p_params -> 'width' between '1' and '16384' and p_params -> 'height' between '1' and '16384'
      then array[(p_params ->> 'width')::float8, (p_params ->> 'height')::float8]
  end;
  v_ratio float8[] := regexp_match(
    p_params ->> 'aspect_ratio', '^0*([1-9]\d{0,3}):0*([1-9]\d{0,3})$'
  )::float8[];
  v_rest jsonb := p_params;
  v_shape float8;
  v_area float8 := 1048576;
  v_rules jsonb;
  v_choices integer[];
  v_step float8[];
  v_least float8[];
  v_most float8[];
  v_factor float8;
  v_side float8;
  v_size jsonb := jsonb '{}';
begin
  if p_params ? 'aspect_ratio' and 'aspect_ratio' = any (p_model.client_inputs)
    and private.input_problem(p_params -> 'aspect_ratio', v_properties -> 'aspect_ratio') is null
  then
    return case when v_takes_pixels then p_params else p_params - v_names end;
  elsif v_ratio is not null then
    v_shape := v_ratio[1] / v_ratio[2];
    v_rest := p_params - 'aspect_ratio'::text;
  end if;
  if v_sides is not null then
    v_shape := coalesce(v_shape, v_sides[1] / v_sides[2]);
    v_area := v_sides[1] * v_sides[2];
    v_rest := v_rest - v_names;
  end if;
  if v_shape is null then
    return p_params;
  elsif v_takes_pixels
    and (v_sides is not null or not 'aspect_ratio' = any (p_model.client_inputs)) then
    for v_at in 1 .. 2 loop
      v_rules := v_properties -> v_names[v_at];
      v_choices := case when v_rules ? 'enum' then array(
        select e.side::integer from jsonb_array_elements_text(v_rules -> 'enum') as e (side)
        where e.side ~ '^\d{1,5}$' order by 1
      ) end;
      -- Of what we choose, multiples of 64, as diffusion models like them.
      v_step[v_at] := coalesce((v_rules ->> 'multipleOf')::float8, 1);
      if v_sides is null and 64 / v_step[v_at] = floor(64 / v_step[v_at]) then
        v_step[v_at] := 64;
      end if;
      v_least[v_at] := coalesce(v_choices[1], (v_rules ->> 'minimum')::float8, 64);
      v_least[v_at] := ceil(v_least[v_at] / v_step[v_at]) * v_step[v_at];
      v_most[v_at] := coalesce(
        v_choices[cardinality(v_choices)], (v_rules ->> 'maximum')::float8, 2048
      );
      v_most[v_at] := floor(v_most[v_at] / v_step[v_at]) * v_step[v_at];
    end loop;
    if v_sides is null then
      v_area := coalesce(
        (v_properties #>> '{width,default}')::float8
        * (v_properties #>> '{height,default}')::float8, v_area
      );
      v_sides := array[sqrt(v_area * v_shape), sqrt(v_area / v_shape)];
    end if;
    v_factor := greatest(
      least(1, v_most[1] / v_sides[1], v_most[2] / v_sides[2]),
      v_least[1] / v_sides[1], v_least[2] / v_sides[2]
    );
    for v_at in 1 .. 2 loop
      v_side := v_sides[v_at] * v_factor;
      v_size := v_size || jsonb_build_object(v_names[v_at], case
        when v_properties -> v_names[v_at] ? 'enum' then (
          select e.side
          from jsonb_array_elements(v_properties -> v_names[v_at] -> 'enum') as e (side)
          where e.side #>> '{}' ~ '^\d{1,5}$'
          order by abs((e.side #>> '{}')::float8 - v_side) limit 1
        )
        else to_jsonb(least(
          v_most[v_at], greatest(v_least[v_at], round(v_side / v_step[v_at]) * v_step[v_at])
        ))
      end);
    end loop;
    -- Some look at pixels only when asked for a custom shape.
    if v_properties ?| '{aspect_ratio,size}' then
      select coalesce(jsonb_object_agg(c.name, 'custom'), '{}') || v_size into v_size
      from unnest('{aspect_ratio,size}'::text[]) as c (name)
      where c.name = any (p_model.client_inputs)
        and v_properties #> array[c.name, 'enum'] @> '["custom"]';
    end if;
  else
    with words as (
      select
        i.name, i.place, e.word, w.shape, w.area,
        bool_or(w.shape > 0) over (partition by i.name) as is_of_shapes
      from unnest(private.size_inputs()) with ordinality as i (name, place)
      cross join jsonb_array_elements(
        coalesce(v_properties #> array[i.name, 'enum'], '[]')
      ) as e (word)
      cross join private.read_size(e.word #>> '{}') as w
      where i.name = any (p_model.client_inputs)
    )
    select coalesce(jsonb_object_agg(best.name, best.word), '{}') into v_size from (
      (
        select w.name, w.word from words as w where w.shape > 0
        order by
          w.place, abs(ln(w.shape / v_shape)), abs(ln(coalesce(w.area, v_area) / v_area)) limit 1
      )
      union all
      (
        select distinct on (w.name) w.name, w.word from words as w
        where w.area > 0 and w.is_of_shapes is not true and v_sides is not null
        order by w.name, abs(ln(w.area / v_area))
      )
    ) as best;
  end if;
  return v_size || v_rest;
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
      when (
        private.owner_of(private.path_id(p.part[2], 1)) = p_user_id
        and private.is_plain_path(p.part[2])
      ) is not true
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

-- What the provider is sent for each prompt. A param of null is not given. A size that the model
-- does not take as it is becomes the nearest it knows. A seed is chosen where the model has one and
-- nobody said it, so that every picture can be made again. It also marks the job: a lost create is
-- found at the provider by its input. params.reuse is ours, not the model's: see
-- enqueue_generation (50). p_field is what a refusal calls a prompt, with its place for %1$s.
--
-- Raises: PT400 invalid_input, naming the field and what is allowed.
create function private.provider_inputs(
  p_model public.models, p_user_id uuid, p_params jsonb, p_prompts text[],
  p_field text default 'prompt'
) returns jsonb[]
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := jsonb_strip_nulls(p_params);
  v_rules jsonb := p_model.input_schema -> 'properties';
  v_prompt_rules jsonb;
  v_name text;
  v_problem text;
  v_inputs jsonb[];
begin
  if v_params - p_model.client_inputs <> '{}'
    or v_params ?& '{width,height}' and v_rules ?| '{aspect_ratio,size}'
    or p_params @> '{"reuse": null}' then
    if jsonb_typeof(p_params -> 'reuse') <> 'boolean' then
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
      if v_problem is not null and v_params ? v_name
        and v_name in ('aspect_ratio', 'width', 'height') then
        v_params := private.map_size(p_model, v_params);
        v_problem := case when v_params ? v_name
          then private.input_problem(v_params -> v_name, v_rules -> v_name)
        end;
      end if;
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
      -- One that is given a picture, an upscaler say, may do without.
      elsif p_model.prompt_input is null or v_params ?| p_model.image_inputs
        and (p_model.input_schema -> 'required' ? p_model.prompt_input) is not true then
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
