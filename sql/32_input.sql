-- Input: do the params fit the model's schema, and what is the provider sent?
--
-- prepare_input does it all before any credit moves. map_size (31) puts a size in the model's own
-- words. check_params holds every param against the schema. complete_input adds defaults, the
-- operator's own values, the prompt and a seed. The generation keeps both what was asked (input)
-- and what is sent (provider_input).

-- Why a value does not fit a property of a schema, with what is allowed; null if it does.
create or replace function private.input_problem(p_value jsonb, p_property jsonb)
returns text
language plpgsql
immutable
set search_path = ''
as $$
declare
  v_type text := p_property ->> 'type';
begin
  if p_value = 'null' and p_property @> '{"nullable": true}' then
    return null;
  elsif p_property ? 'anyOf' then
    return case when (
      select bool_and(private.input_problem(p_value, o.value) is not null)
      from jsonb_array_elements(p_property -> 'anyOf') as o
    ) then 'none of its types: ' || left(p_property ->> 'anyOf', 1000) end;
  elsif jsonb_typeof(p_value) is distinct from replace(v_type, 'integer', 'number')
    or (v_type = 'integer' and p_value::numeric % 1 <> 0) then
    return 'not of type ' || coalesce(v_type, 'allowed here');
  elsif p_property ? 'enum' and not (p_property -> 'enum') @> jsonb_build_array(p_value) then
    return 'not one of ' || left(p_property ->> 'enum', 1000);
  end if;
  return case jsonb_typeof(p_value)
    when 'number' then private.number_problem(p_value::numeric, p_property)
    when 'string' then private.length_problem(length(p_value #>> '{}'), p_property, 'Length', null)
    when 'array' then coalesce(
      private.length_problem(jsonb_array_length(p_value), p_property, 'Items', 16),
      private.items_problem(p_value, p_property -> 'items')
    )
  end;
end;
$$;

revoke all on function private.input_problem(jsonb, jsonb)
from public, anon, authenticated, service_role;

-- The same for the range of a number; beyond 2^53 JSON numbers are not exact.
create or replace function private.number_problem(p_number numeric, p_property jsonb)
returns text
language sql
immutable
set search_path = ''
as $$
  select case
    when p_number < l.lowest or p_number > l.highest
      then format('not between %s and %s', l.lowest, l.highest)
    when p_number <= (p_property ->> 'exclusiveMinimum')::numeric
      then 'not above ' || (p_property ->> 'exclusiveMinimum')
    when p_number >= (p_property ->> 'exclusiveMaximum')::numeric
      then 'not below ' || (p_property ->> 'exclusiveMaximum')
    when p_number % (p_property ->> 'multipleOf')::numeric <> 0
      then 'not a multiple of ' || (p_property ->> 'multipleOf')
  end
  from (
    select
      coalesce((p_property ->> 'minimum')::numeric, -9007199254740991) as lowest,
      coalesce((p_property ->> 'maximum')::numeric, 9007199254740991) as highest
  ) as l
$$;

revoke all on function private.number_problem(numeric, jsonb)
from public, anon, authenticated, service_role;

-- The same for the length of a text (minLength, maxLength) or an array (minItems, maxItems).
create or replace function private.length_problem(
  p_length integer,
  p_property jsonb,
  p_unit text,
  p_default_max integer
)
returns text
language sql
immutable
set search_path = ''
as $$
  select case
    when p_length > l.most then format('longer than %s %s', l.most, l.unit)
    when p_length < l.least then format('shorter than %s %s', l.least, l.unit)
  end
  from (
    select
      coalesce((p_property ->> ('max' || p_unit))::numeric, p_default_max) as most,
      (p_property ->> ('min' || p_unit))::numeric as least,
      case p_unit when 'Items' then 'items' else 'characters' end as unit
  ) as l
$$;

revoke all on function private.length_problem(integer, jsonb, text, integer)
from public, anon, authenticated, service_role;

-- The same for the items of an array.
create or replace function private.items_problem(p_value jsonb, p_items jsonb)
returns text
language sql
immutable
set search_path = ''
as $$
  select 'an item is ' || q.problem
  from jsonb_array_elements(p_value) with ordinality as i (value, place)
  cross join private.input_problem(i.value, p_items) as q (problem)
  where q.problem is not null
  order by i.place limit 1
$$;

revoke all on function private.items_problem(jsonb, jsonb)
from public, anon, authenticated, service_role;

-- Every param is one the model takes from clients and fits its schema; none it needs is missing.
--
-- Raises: PT400 invalid_input, naming the field and what is allowed.
create or replace function private.check_params(p_model public.models, p_params jsonb)
returns void
language plpgsql
stable
set search_path = ''
as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_name text;
  v_problem text;
begin
  select p.name into v_name
  from jsonb_object_keys(p_params) as p (name)
  where not p.name = any (p_model.client_inputs)
  order by p.name limit 1;
  if found then
    perform private.refuse_input(
      format('params.%s: not an input of %s', left(v_name, 60), p_model.id),
      'Allowed: ' || array_to_string(p_model.client_inputs, ', ')
    );
  end if;
  select p.key, q.problem into v_name, v_problem
  from jsonb_each(p_params) as p
  cross join private.input_problem(p.value, v_properties -> p.key) as q (problem)
  where q.problem is not null
  order by p.key limit 1;
  if found then
    perform private.refuse_input(format('params.%s: %s', v_name, v_problem));
  end if;
  select r.name into v_name
  from jsonb_array_elements_text(coalesce(p_model.input_schema -> 'required', '[]')) as r (name)
  where r.name = any (p_model.client_inputs) and not v_properties -> r.name ? 'default'
    and not p_params ? r.name and not p_model.operator_input ? r.name and r.name <> 'seed'
  order by r.name limit 1;
  if found then
    perform private.refuse_input(format('params.%s: missing', v_name));
  end if;
end;
$$;

revoke all on function private.check_params(public.models, jsonb)
from public, anon, authenticated, service_role;

-- Source images are files in bucket inputs, in the user's own folder. An address is none.
--
-- Raises: PT400 invalid_input.
create or replace function private.check_source_images(
  p_model public.models,
  p_user_id uuid,
  p_params jsonb
)
returns void
language plpgsql
stable
set search_path = ''
as $$
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

revoke all on function private.check_source_images(public.models, uuid, jsonb)
from public, anon, authenticated, service_role;

-- A seed where the model has one, so that every picture can be made again. It also marks the job: a
-- lost create is found at the provider by its input.
create or replace function private.choose_seed(p_model public.models)
returns jsonb
language sql
volatile
set search_path = ''
as $$
  select coalesce((
    select jsonb_build_object(
      'seed', floor(s.lowest + random() * (s.highest - s.lowest + 1))::bigint
    )
    from (
      select
        greatest(0, (p.rules ->> 'minimum')::double precision) as lowest,
        least(2147483647, (p.rules ->> 'maximum')::double precision) as highest
      from (select p_model.input_schema #> '{properties,seed}' as rules) as p
      where p.rules ->> 'type' = 'integer' and not p_model.operator_input ? 'seed'
    ) as s
  ), '{}')
$$;

revoke all on function private.choose_seed(public.models)
from public, anon, authenticated, service_role;

-- There is nothing to read in a text, or no text.
create or replace function private.is_blank(p_text text)
returns boolean
language sql
immutable
set search_path = ''
as $$
  select p_text !~ '[^[:space:]\u00a0\u200b\u2060\ufeff]' is not false
$$;

revoke all on function private.is_blank(text) from public, anon, authenticated, service_role;

-- The model makes nothing without a prompt. One that needs a picture and has a prompt of its own,
-- an upscaler say, does.
create or replace function private.needs_prompt(p_model public.models)
returns boolean
language sql
immutable
set search_path = ''
as $$
  select p_model.prompt_input is not null and not (
    coalesce(p_model.input_schema -> 'required' ?| p_model.image_inputs, false)
    and not p_model.input_schema -> 'required' ? p_model.prompt_input
    and p_model.input_schema #> array['properties', p_model.prompt_input] ? 'default'
  )
$$;

revoke all on function private.needs_prompt(public.models)
from public, anon, authenticated, service_role;

-- What the provider is sent: defaults, seed, the user's params, the operator's own values, prompt.
create or replace function private.complete_input(
  p_model public.models,
  p_prompt text,
  p_params jsonb
)
returns jsonb
language sql
volatile
set search_path = ''
as $$
  select
    coalesce(
      jsonb_object_agg(p.key, p.value -> 'default') filter (where p.value ? 'default'), '{}'
    )
    || private.choose_seed(p_model)
    || p_params
    || p_model.operator_input
    || case
      when p_model.prompt_input is null
        or (private.is_blank(p_prompt) and not private.needs_prompt(p_model)) then '{}'
      else jsonb_build_object(p_model.prompt_input, p_prompt)
    end
  from jsonb_each(p_model.input_schema -> 'properties') as p
$$;

revoke all on function private.complete_input(public.models, text, jsonb)
from public, anon, authenticated, service_role;

-- params.reuse is ours, not the model's: see find_reusable (50). Raises: PT400 invalid_input.
create or replace function private.check_reuse(p_params jsonb)
returns void
language plpgsql
set search_path = ''
as $$
begin
  if p_params ? 'reuse' and jsonb_typeof(p_params -> 'reuse') <> 'boolean' then
    perform private.refuse_input('params.reuse: not of type boolean');
  elsif p_params @> '{"reuse": true}' and not p_params ? 'seed' then
    perform private.refuse_input(
      'params.reuse: needs params.seed', 'Without a seed every picture is another one.'
    );
  end if;
end;
$$;

revoke all on function private.check_reuse(jsonb) from public, anon, authenticated, service_role;

-- The whole way from what a user gave to what the provider is sent.
--
-- Raises: PT400 invalid_input.
create or replace function private.prepare_input(
  p_model public.models,
  p_user_id uuid,
  p_prompt text,
  p_params jsonb
)
returns jsonb
language plpgsql
volatile
set search_path = ''
as $$
declare
  v_params jsonb := private.map_size(p_model, p_params - 'reuse');
  v_problem text;
begin
  perform private.check_reuse(p_params);
  if private.is_blank(p_prompt) and private.needs_prompt(p_model) then
    perform private.refuse_input('prompt: missing or blank');
  end if;
  v_problem := private.input_problem(
    to_jsonb(p_prompt), p_model.input_schema #> array['properties', p_model.prompt_input]
  );
  if v_problem is not null and p_model.prompt_input is not null then
    perform private.refuse_input('prompt: ' || v_problem);
  end if;
  perform private.check_params(p_model, v_params);
  perform private.check_source_images(p_model, p_user_id, v_params);
  return private.complete_input(p_model, p_prompt, v_params);
end;
$$;

revoke all on function private.prepare_input(public.models, uuid, text, jsonb)
from public, anon, authenticated, service_role;
