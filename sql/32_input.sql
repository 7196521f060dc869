-- Input: do the params fit the model's schema, and what is the provider sent?
--
-- All of it is done before any credit moves. prepare_params takes what the jobs of a batch
-- have in common: map_size (31) puts a size in the model's own words, check_params holds every
-- param against the schema, and defaults and the operator's own values are added. complete_input
-- adds a prompt and a seed. The generation keeps both what was asked (input) and what is sent
-- (provider_input).

-- Why a value does not fit a property of a schema, with what is allowed; null if it does.
create function private.input_problem(p_value jsonb, p_property jsonb) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_type text := p_property ->> 'type';
begin
  if p_property ?| '{anyOf,enum,nullable}' then
    if p_value = 'null' and p_property @> '{"nullable": true}' then
      return null;
    elsif p_property ? 'anyOf' then
      return case when (
        select bool_and(private.input_problem(p_value, o.value) is not null)
        from jsonb_array_elements(p_property -> 'anyOf') as o
      ) then 'none of its types: ' || left(p_property ->> 'anyOf', 1000) end;
    end if;
  end if;
  if jsonb_typeof(p_value) is distinct from replace(v_type, 'integer', 'number')
    or (v_type = 'integer' and p_value::numeric % 1 <> 0) then
    return 'not of type ' || coalesce(v_type, 'allowed here');
  elsif p_property ? 'enum' and not (p_property -> 'enum') @> jsonb_build_array(p_value) then
    return 'not one of ' || left(p_property ->> 'enum', 1000);
  end if;
  return case jsonb_typeof(p_value)
    when 'number' then case
      when p_value >= p_property -> 'minimum' and p_value <= p_property -> 'maximum'
        and not p_property ?| '{exclusiveMinimum,exclusiveMaximum,multipleOf}' then null
      else private.number_problem(p_value::numeric, p_property)
    end
    when 'string' then case when p_property ?| '{maxLength,minLength}' then
      private.length_problem(length(p_value #>> '{}'), p_property, 'Length', null)
    end
    when 'array' then coalesce(
      private.length_problem(jsonb_array_length(p_value), p_property, 'Items', 16),
      private.items_problem(p_value, p_property -> 'items')
    )
  end;
end;
$$;

-- The same for the range of a number; beyond 2^53 JSON numbers are not exact.
create function private.number_problem(p_number numeric, p_property jsonb) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_lowest numeric := coalesce((p_property ->> 'minimum')::numeric, -9007199254740991);
  v_highest numeric := coalesce((p_property ->> 'maximum')::numeric, 9007199254740991);
begin
  if p_number not between v_lowest and v_highest then
    return format('not between %s and %s', v_lowest, v_highest);
  elsif p_property ?| '{exclusiveMinimum,exclusiveMaximum,multipleOf}' then
    return case
      when p_number <= (p_property ->> 'exclusiveMinimum')::numeric
        then 'not above ' || (p_property ->> 'exclusiveMinimum')
      when p_number >= (p_property ->> 'exclusiveMaximum')::numeric
        then 'not below ' || (p_property ->> 'exclusiveMaximum')
      when p_number % (p_property ->> 'multipleOf')::numeric <> 0
        then 'not a multiple of ' || (p_property ->> 'multipleOf')
    end;
  end if;
  return null;
end;
$$;

-- The same for the length of a text (minLength, maxLength) or an array (minItems, maxItems).
create function private.length_problem(
  p_length integer, p_property jsonb, p_unit text, p_default_max integer
) returns text
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_most numeric := coalesce((p_property ->> ('max' || p_unit))::numeric, p_default_max);
  v_least numeric := (p_property ->> ('min' || p_unit))::numeric;
  v_unit text := case p_unit when 'Items' then 'items' else 'characters' end;
begin
  return case
    when p_length > v_most then format('longer than %s %s', v_most, v_unit)
    when p_length < v_least then format('shorter than %s %s', v_least, v_unit)
  end;
end;
$$;

-- The same for the items of an array.
create function private.items_problem(p_value jsonb, p_items jsonb) returns text
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select 'an item is ' || q.problem
  from jsonb_array_elements(p_value) with ordinality as i (value, place)
  cross join private.input_problem(i.value, p_items) as q (problem)
  where q.problem is not null
  order by i.place limit 1
$$;

-- Answers the params if every one is one the model takes from clients and fits its schema, and none
-- it needs is missing.
--
-- Raises: PT400 invalid_input, naming the field and what is allowed.
create function private.check_params(p_model public.models, p_params jsonb) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_required jsonb := p_model.input_schema -> 'required';
  v_foreign jsonb := p_params - p_model.client_inputs;
  v_name text;
  v_problem text;
begin
  if v_foreign <> '{}' then
    select min(f.name) into v_name from jsonb_object_keys(v_foreign) as f (name);
    perform private.refuse_input(
      format('params.%s: not an input of %s', left(v_name, 60), p_model.id),
      'Allowed: ' || array_to_string(p_model.client_inputs, ', ')
    );
  end if;
  foreach v_name in array p_model.client_inputs loop
    if p_params ? v_name then
      v_problem := private.input_problem(p_params -> v_name, v_properties -> v_name);
      if v_problem is not null then
        perform private.refuse_input(format('params.%s: %s', v_name, v_problem));
      end if;
    elsif v_required ? v_name and v_name <> 'seed' and not v_properties -> v_name ? 'default'
      and not p_model.operator_input ? v_name then
      perform private.refuse_input(format('params.%s: missing', v_name));
    end if;
  end loop;
  return p_params;
end;
$$;

-- Source images are files in bucket inputs, in the user's own folder. An address is none.
--
-- Raises: PT400 invalid_input.
create function private.check_source_images(
  p_model public.models, p_user_id uuid, p_params jsonb
) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_name text;
  v_path text;
begin
  for v_name, v_path in
    select i.name, p.path
    from unnest(p_model.image_inputs) as i (name)
    cross join jsonb_path_query(p_params -> i.name, 'lax $[*]') as v (path)
    cross join lateral (select v.path #>> '{}' as path) as p
    where v.path <> 'null'
  loop
    if v_path !~ ('^' || p_user_id || '(/[A-Za-z0-9_-][A-Za-z0-9_. -]{0,100}){1,4}$') then
      perform private.refuse_input(
        format('params.%s: not a path in your folder of bucket inputs', v_name),
        format('Upload the picture to inputs as %s/<name> and give that path.', p_user_id)
      );
    elsif to_regclass('storage.objects') is not null and not exists (
      select from storage.objects where bucket_id = 'inputs' and name = v_path
    ) then
      perform private.refuse_input(format('params.%s: no such file in bucket inputs', v_name));
    end if;
  end loop;
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

-- The model makes nothing without a prompt. One that needs a picture and has a prompt of its own,
-- an upscaler say, does.
create function private.needs_prompt(p_model public.models) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select p_model.prompt_input is not null and not (
    coalesce(p_model.input_schema -> 'required' ?| p_model.image_inputs, false)
    and not p_model.input_schema -> 'required' ? p_model.prompt_input
    and p_model.input_schema #> array['properties', p_model.prompt_input] ? 'default'
  )
$$;

-- params.reuse is ours, not the model's: see find_reusable (50). Raises: PT400 invalid_input.
create function private.check_reuse(p_params jsonb) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if jsonb_typeof(p_params -> 'reuse') <> 'boolean' then
    perform private.refuse_input('params.reuse: not of type boolean');
  elsif p_params @> '{"reuse": true}' and not p_params ? 'seed' then
    perform private.refuse_input(
      'params.reuse: needs params.seed', 'Without a seed every picture is another one.'
    );
  end if;
end;
$$;

-- What all of a request's jobs are sent but for prompt and seed: defaults, the user's params, the
-- operator's own values.
--
-- Raises: PT400 invalid_input.
create function private.prepare_params(
  p_model public.models, p_user_id uuid, p_params jsonb
) returns jsonb
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
  v_params jsonb := p_params;
begin
  if v_params ? 'reuse' then
    perform private.check_reuse(v_params);
    v_params := v_params - 'reuse';
  end if;
  if v_params ?& '{width,height}' or v_params ? 'aspect_ratio' then
    v_params := private.map_size(p_model, v_params);
  end if;
  v_params := private.check_params(p_model, v_params);
  if v_params ?| p_model.image_inputs then
    perform private.check_source_images(p_model, p_user_id, v_params);
  end if;
  return p_model.default_input || v_params || p_model.operator_input;
end;
$$;

-- What the provider is sent for one prompt: with a seed where the model has one, so that every
-- picture can be made again. It also marks the job: a lost create is found at the provider by its
-- input.
--
-- Raises: PT400 invalid_input.
create function private.complete_input(
  p_model public.models, p_prepared jsonb, p_prompt text, p_field text default 'prompt'
) returns jsonb
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_input jsonb := p_prepared;
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_seed jsonb := v_properties -> 'seed';
  v_lowest bigint;
  v_highest bigint;
  v_problem text;
begin
  if p_prompt !~ '[0-9A-Za-z]' and private.is_blank(p_prompt) then
    if private.needs_prompt(p_model) then
      perform private.refuse_input(p_field || ': missing or blank');
    end if;
  elsif p_model.prompt_input is not null then
    if v_properties -> p_model.prompt_input ?| '{anyOf,enum,maxLength,minLength}' then
      v_problem := private.input_problem(
        to_jsonb(p_prompt), v_properties -> p_model.prompt_input
      );
      if v_problem is not null then
        perform private.refuse_input(format('%s: %s', p_field, v_problem));
      end if;
    end if;
    v_input := v_input || jsonb_build_object(p_model.prompt_input, p_prompt);
  end if;
  if v_seed ->> 'type' = 'integer' and not v_input ? 'seed' then
    v_lowest := greatest(0, (v_seed ->> 'minimum')::numeric);
    v_highest := least(2147483647, (v_seed ->> 'maximum')::numeric);
    v_input := v_input || jsonb_build_object(
      'seed', v_lowest + floor(random() * (v_highest - v_lowest + 1))::bigint
    );
  end if;
  return v_input;
end;
$$;
