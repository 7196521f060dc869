-- Importing models: a provider's own description of a model becomes a row of the catalogue.
--
-- import_model takes what Replicate's GET /models/{owner}/{name} answers and an object of options,
-- maps schema (35) and inputs (36) to a row, and inserts or updates it. What it cannot map it
-- refuses with the reason. What an operator has decided (prices, title, deadline, whether it is
-- active, which known inputs are the clients') outlives every later import.

-- Why the output is nothing we can store as images; null if it may be.
create or replace function private.output_problem(p_output jsonb, p_prose text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select case
    when coalesce(p_output #>> '{items,type}', p_output ->> 'type')
      in ('number', 'integer', 'boolean', 'null')
      then format(
        'its output is a %s, not an image',
        coalesce(p_output #>> '{items,type}', p_output ->> 'type')
      )
    when p_output @? '$.** ? (@.type == "string")' and not private.takes_file(p_output)
      then 'its output is text, not an image'
    when p_output ? 'properties' and not p_output @? '$.properties.* ? (!exists(@.type))'
      and not private.takes_file(p_output)
      then 'its output holds no file'
    when p_output ? 'properties' and not exists (
      select from jsonb_each(p_output -> 'properties') as p
      where p.key !~* '(video|audio|mp4|mp3|wav|weights|model|mesh|glb|zip|npz|text|json|log)'
    ) then 'its output holds no image'
    when o.medium is not null then format('its output is %s, not an image', o.medium)
  end
  from (
    select substring(
      p_prose from '\m(videos?|mp4|webm|audio|wav|mp3|music|songs?|speech|voice|sound|3d|mesh)\M'
    ) as medium
  ) as o
$$;

revoke all on function private.output_problem(jsonb, text)
from public, anon, authenticated, service_role;

-- What tells of videos and sounds where the output's type is a mere address: the name, a sentence
-- such as text-to-video, frames per second among the inputs.
create or replace function private.output_prose(p_model jsonb, p_schemas jsonb)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select lower(concat_ws(
    ' ',
    translate(p_model ->> 'name', '-_.', '   '),
    p_schemas #>> '{Output,title}',
    p_schemas #>> '{Output,description}',
    substring(
      lower(p_model ->> 'description') from '\m(?:to|2)[- ]?(video|audio|speech|music|3d)\M'
    ),
    substring(
      lower(p_model ->> 'description')
      from '\m((?:video|audio|music|speech) generation|generative (?:video|audio|music)'
      '|sound effects)\M'
    ),
    substring(
      lower(p_model ->> 'description')
      from '\m(?:generat|creat|mak)(?:es?|ing) (?:[a-z-]+ ){0,3}(videos?|music|songs?|audio)\M'
    ),
    case
      when (p_schemas #> '{Input,properties}') ?| '{fps,num_frames,frames_per_second,video_length}'
        and p_schemas::text !~* '\mgif\M' then 'video'
      when (p_schemas #>> '{Input,properties}') ~ '"(mp4|webm|mov|mp3|wav|flac|ogg)"'
        and (p_schemas #>> '{Input,properties}') !~ '"(png|jpe?g|webp|gif)"'
        then substring(p_schemas #>> '{Input,properties}' from '"(mp4|webm|mp3|wav)"')
    end
  ))
$$;

revoke all on function private.output_prose(jsonb, jsonb)
from public, anon, authenticated, service_role;

-- The schemas of a model's description: Input, Output, and what they refer to.
--
-- Raises: PT400 invalid_input if there is no input, or if the output is no image.
create or replace function private.model_schemas(p_model jsonb)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_schemas jsonb := p_model #> '{latest_version,openapi_schema,components,schemas}';
  v_problem text;
begin
  if coalesce(jsonb_typeof(v_schemas -> 'Input'), '') <> 'object' then
    perform private.refuse_model('it has no latest_version.openapi_schema with an Input');
  end if;
  v_schemas := case jsonb_typeof(v_schemas #> '{Input,$defs}')
    when 'object' then v_schemas #> '{Input,$defs}' else '{}'
  end || v_schemas;
  if coalesce(jsonb_typeof(v_schemas #> '{Input,properties}'), '') <> 'object' then
    v_schemas := jsonb_set(v_schemas, '{Input,properties}', '{}');
  end if;
  v_problem := private.output_problem(
    private.resolve_schema(v_schemas -> 'Output', v_schemas),
    private.output_prose(p_model, v_schemas)
  );
  if v_problem is not null then
    perform private.refuse_model(v_problem);
  end if;
  return v_schemas;
end;
$$;

revoke all on function private.model_schemas(jsonb)
from public, anon, authenticated, service_role;

-- The columns that a model's schemas determine.
create or replace function private.map_inputs(p_schemas jsonb)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_build_object(
    'prompt_input', f.prompt,
    'image_count_input', f.count_input,
    'max_images', least(16, coalesce(
      (select max(e.value::numeric) from jsonb_array_elements(f.count_rules -> 'enum') as e),
      (f.count_rules ->> 'maximum')::numeric,
      1
    )),
    'image_inputs', coalesce(jsonb_agg(p.name) filter (where p.takes_image), '[]'),
    'client_inputs', coalesce(jsonb_agg(p.name) filter (
      where p.name is distinct from f.prompt and (p.takes_image or not p.is_operators)
        and (p.name = f.count_input or not private.counts_images(p.snake, p.rules))
    ), '[]'),
    'input_schema', jsonb_build_object(
      'required', coalesce(jsonb_agg(p.name) filter (where p.is_required), '[]'),
      'properties', coalesce(jsonb_object_agg(
        p.name, case p.name when f.count_input then f.count_rules else p.rules end
      ) filter (where p.name is not null), '{}')
    )
  )
  from (
    select private.find_prompt(p_schemas) as prompt, c.name as count_input, c.rules as count_rules
    from (select) as one left join private.find_count(p_schemas) as c on true
  ) as f
  left join private.model_properties(p_schemas) as p on true
  group by f.prompt, f.count_input, f.count_rules
$$;

revoke all on function private.map_inputs(jsonb) from public, anon, authenticated, service_role;

-- The columns of a catalogue row that the provider's description determines. An official model is
-- called by its name, any other by its version; where the description does not say, an official
-- one shows by the images it bills.
--
-- Raises: PT400 invalid_input, with the reason.
create or replace function private.map_model(p_model jsonb)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_id text := concat(p_model ->> 'owner', '/', p_model ->> 'name');
  v_version text := p_model #>> '{latest_version,id}';
begin
  if v_id !~ '^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$' then
    perform private.refuse_model('it has no owner and name as Replicate writes them');
  end if;
  return private.map_inputs(private.model_schemas(p_model)) || jsonb_build_object(
    'id', lower(v_id),
    'provider', 'replicate',
    'provider_ref', v_id || case
      when v_version is null or coalesce(
        (p_model ->> 'is_official')::boolean,
        (p_model #> '{default_example,metrics}') ?| '{image_count,image_output_count}'
      ) then ''
      else ':' || v_version
    end
  );
end;
$$;

revoke all on function private.map_model(jsonb) from public, anon, authenticated, service_role;

-- The inputs clients may set: of those an operator knew before, what was decided then; of new ones,
-- what is safe; and what is allowed by name.
create or replace function private.merge_client_inputs(
  p_old public.models,
  p_mapped jsonb,
  p_options jsonb
)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select coalesce(jsonb_agg(distinct n.name), '[]')
  from (
    select m.name
    from jsonb_object_keys(p_mapped #> '{input_schema,properties}') as m (name)
    where case
      when coalesce((p_old.input_schema -> 'properties') ? m.name, false)
        then m.name = any (p_old.client_inputs)
      else (p_mapped -> 'client_inputs') ? m.name
        and not coalesce((p_options -> 'operator_input') ? m.name, false)
    end
    union all
    select a.name from jsonb_array_elements_text(p_options -> 'allow_inputs') as a (name)
  ) as n
  where n.name is distinct from p_mapped ->> 'prompt_input'
$$;

revoke all on function private.merge_client_inputs(public.models, jsonb, jsonb)
from public, anon, authenticated, service_role;

-- The whole row: what was there, under what the provider says, under what the operator says.
create or replace function private.merge_model(p_old public.models, p_mapped jsonb, p_options jsonb)
returns public.models
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_populate_record(
    null::public.models,
    jsonb_build_object(
      'title', initcap(translate(split_part(p_mapped ->> 'id', '/', 2), '-_', '  ')),
      'price_credits', 1,
      'paid_price_credits', coalesce(p_options -> 'price_credits', '1'),
      -- Without a price nobody has decided to sell it.
      'is_active', p_options ? 'price_credits',
      'requires_paid', false,
      'deadline', '5 minutes',
      'operator_input', '{}'::jsonb
    )
    || case when p_old.id is null then '{}' else to_jsonb(p_old) end
    || p_mapped
    || jsonb_build_object(
      'is_schema_confirmed', true,
      'client_inputs', i.client_inputs,
      'image_inputs', jsonb_path_query_array(
        p_mapped -> 'image_inputs', '$[*] ? (@ == $names[*])',
        jsonb_build_object('names', i.client_inputs)
      ),
      'image_count_input', case
        when i.client_inputs ? (p_mapped ->> 'image_count_input')
          then p_mapped -> 'image_count_input'
      end,
      -- Fewer than the provider makes is what an operator wanted; where clients cannot say how
      -- many, so is more than one.
      'max_images', case
        when i.client_inputs ? (p_mapped ->> 'image_count_input') is not true then case
          when p_old.image_count_input is null then coalesce(p_old.max_images, 1) else 1
        end
        when p_old.max_images < (
          p_old.input_schema #>> array['properties', p_old.image_count_input, 'maximum']
        )::numeric then least(p_old.max_images, (p_mapped ->> 'max_images')::integer)
        else (p_mapped ->> 'max_images')::integer
      end
    )
    || (p_options - 'allow_inputs')
  )
  from (
    select private.merge_client_inputs(p_old, p_mapped, p_options) as client_inputs
  ) as i
$$;

revoke all on function private.merge_model(public.models, jsonb, jsonb)
from public, anon, authenticated, service_role;

-- The row can work: what is required can come from somewhere, and what is named is there.
--
-- Raises: PT400 invalid_input, with the reason.
create or replace function private.check_model(p_model public.models)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_properties jsonb := p_model.input_schema -> 'properties';
  v_name text;
begin
  select r.name into v_name
  from jsonb_array_elements_text(p_model.input_schema -> 'required') as r (name)
  where r.name is distinct from p_model.prompt_input
    and not r.name = any (p_model.client_inputs)
    and not v_properties -> r.name ? 'default'
    and not p_model.operator_input ? r.name
  order by r.name limit 1;
  if found then
    perform private.refuse_model(format(
      'input %s is required, but not for clients: give it in operator_input or allow it', v_name
    ));
  end if;
  select i.name into v_name
  from unnest(p_model.client_inputs) as i (name)
  where not v_properties ? i.name
  order by i.name limit 1;
  if found then
    perform private.refuse_model(format('it has no input %s', v_name));
  end if;
end;
$$;

revoke all on function private.check_model(public.models)
from public, anon, authenticated, service_role;

-- Raises PT400 invalid_input for options that are not known.
create or replace function private.check_import_options(p_options jsonb)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_known constant text[] := cast('{price_credits,paid_price_credits,requires_paid,is_active,title,'
    'provider_ref,deadline,cost_usd,cost_unit,max_images,client_inputs,image_inputs,prompt_input,'
    'image_count_input,operator_input,allow_inputs}' as text[]);
  v_unknown text := (
    select min(o.name) from jsonb_object_keys(p_options) as o (name)
    where not o.name = any (v_known)
  );
begin
  if v_unknown is not null then
    perform private.refuse_input(
      format('options.%s: not an option', v_unknown), 'Known: ' || array_to_string(v_known, ', ')
    );
  end if;
end;
$$;

revoke all on function private.check_import_options(jsonb)
from public, anon, authenticated, service_role;

-- Enters or renews a model. Answers each column that changes, before and after.
--
-- Raises: PT400 invalid_input, with the reason; nothing is written then.
create or replace function private.import_model(
  p_model jsonb,
  p_options jsonb default '{}',
  p_dry_run boolean default false
)
returns table (field text, old_value jsonb, new_value jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  v_mapped jsonb := private.map_model(p_model);
  v_old public.models;
  v_new public.models;
begin
  perform private.check_import_options(p_options);
  select * into v_old from public.models where id = v_mapped ->> 'id' for update;
  v_new := private.merge_model(v_old, v_mapped, p_options);
  perform private.check_model(v_new);
  if v_new is distinct from v_old and not p_dry_run then
    delete from public.models where id = v_new.id;
    insert into public.models select v_new.*;
  end if;
  return query
  select n.key, o.value, n.value
  from jsonb_each(to_jsonb(v_new)) as n
  left join jsonb_each(to_jsonb(v_old)) as o on o.key = n.key
  where o.value is distinct from n.value and (v_old.id is not null or n.value <> 'null')
  order by n.key;
end;
$$;

comment on function private.import_model is
  'Maps what Replicate''s GET /models/{owner}/{name} answers to a row of models. p_options: '
  'columns to set (price_credits, paid_price_credits, requires_paid, is_active, title, '
  'provider_ref, deadline, cost_usd, cost_unit, max_images, client_inputs, image_inputs, '
  'prompt_input, image_count_input, operator_input) and allow_inputs, an array of operator '
  'inputs to open to clients. p_dry_run changes nothing. Answers the columns that change. '
  'Errors: PT400 invalid_input, the reason.';

revoke all on function private.import_model(jsonb, jsonb, boolean)
from public, anon, authenticated, service_role;
