-- A provider's schema in our words: references resolved, prose left out, nothing but rules.
--
-- A model's input_schema is
--   {"required": [name], "properties": {name: {type, enum, minimum, maximum, exclusiveMinimum,
--    exclusiveMaximum, multipleOf, minLength, maxLength, minItems, maxItems, items, default,
--    format, nullable, anyOf}}}
-- resolve_schema turns one part of an OpenAPI document into such rules. Then limit_rules adds what
-- a provider left open and we do not: sizes, steps, a default that fits.

-- Raises PT400 invalid_input: the model cannot be mapped, and why.
create or replace function private.refuse_model(p_reason text)
returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  perform private.refuse_input('model: ' || p_reason, 'Nothing was imported.');
end;
$$;

revoke all on function private.refuse_model(text) from public, anon, authenticated, service_role;

-- What of a resolved node is a rule and well formed. Null is no value: an enum that holds it is
-- nullable, a default of null is none.
create or replace function private.rules_of(p_node jsonb)
returns jsonb
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select jsonb_strip_nulls(
    coalesce(jsonb_object_agg(k.key, k.value) filter (
      where case k.key
        when 'items' then jsonb_typeof(k.value) = 'object'
        when 'properties' then jsonb_typeof(k.value) = 'object'
        when 'anyOf' then jsonb_typeof(k.value) = 'array'
        when 'default' then true
        when 'multipleOf' then jsonb_typeof(k.value) = 'number' and k.value > '0'
        else k.key in (
          'minimum', 'maximum', 'exclusiveMinimum', 'exclusiveMaximum', 'minLength', 'maxLength',
          'minItems', 'maxItems'
        ) and jsonb_typeof(k.value) = 'number'
      end
    ), '{}')
    || jsonb_build_object(
      'type', coalesce(
        case jsonb_typeof(p_node -> 'type') when 'string' then p_node -> 'type' end,
        case when p_node @? '$.enum[*] ? (@.type() == "number")' and not
          p_node @? '$.enum[*] ? (@ % 1 != 0)' then '"integer"'::jsonb end,
        to_jsonb(jsonb_typeof(jsonb_path_query_first(p_node, '$.enum[*] ? (@ != null)'))),
        to_jsonb(jsonb_typeof(p_node -> 'const'))
      ),
      'nullable', case
        when p_node @> '{"nullable": true}' or p_node @> '{"enum": [null]}' then true
      end,
      'enum', coalesce(
        nullif(jsonb_path_query_array(p_node, 'strict $.enum[*] ? (@ != null)', '{}', true), '[]'),
        case when p_node ? 'const' then jsonb_build_array(p_node -> 'const') end
      ),
      'format', case
        when p_node @> '{"writeOnly": true}' or p_node @> '{"x-cog-secret": true}' then 'password'
        else p_node ->> 'format'
      end
    )
    -- OpenAPI 3.0 says with a boolean that the limit itself is out.
    || case when p_node @> '{"exclusiveMinimum": true}'
      then jsonb_build_object('exclusiveMinimum', p_node -> 'minimum') else '{}' end
    || case when p_node @> '{"exclusiveMaximum": true}'
      then jsonb_build_object('exclusiveMaximum', p_node -> 'maximum') else '{}' end
  )
  from jsonb_each(p_node) as k
$$;

revoke all on function private.rules_of(jsonb) from public, anon, authenticated, service_role;

-- One part of a schema as rules: $ref, allOf and unions resolved.
--
-- Raises: PT400 invalid_input for a reference that leads nowhere or round in circles.
create or replace function private.resolve_schema(
  p_node jsonb,
  p_schemas jsonb,
  p_path text[] default '{}'
)
returns jsonb
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
  v_node jsonb := case jsonb_typeof(p_node) when 'object' then p_node else '{}' end;
  v_ref text := v_node ->> '$ref';
  v_name text := substring(v_ref from '^#/(?:components/schemas|\$defs|definitions)/(.+)$');
  v_path text[] := p_path || coalesce(v_name, '');
  v_part jsonb;
begin
  if v_ref is not null and p_schemas ? v_name is not true then
    perform private.refuse_model(format('%s leads nowhere', v_ref));
  elsif v_name = any (p_path) or cardinality(p_path) > 20 then
    perform private.refuse_model(format('%s leads round in circles', coalesce(v_ref, 'it')));
  end if;
  for v_part in
    select p_schemas -> v_name where v_name is not null
    union all
    select a.value from jsonb_path_query(v_node, 'strict $.allOf[*]', silent => true) as a (value)
  loop
    v_node := private.resolve_schema(v_part, p_schemas, v_path) || v_node;
  end loop;
  v_node := private.resolve_union(v_node, p_schemas, v_path) || (
    v_node - '{anyOf,oneOf}'::text[]
    - case jsonb_typeof(v_node -> 'type') when 'array' then 'type' else '' end
  );
  if jsonb_typeof(v_node -> 'items') = 'object' then
    v_node := v_node || jsonb_build_object(
      'items', private.resolve_schema(v_node -> 'items', p_schemas, v_path)
    );
  end if;
  if jsonb_typeof(v_node -> 'properties') = 'object' then
    v_node := v_node || jsonb_build_object('properties', (
      select jsonb_object_agg(p.key, private.resolve_schema(p.value, p_schemas, v_path))
      from jsonb_each(v_node -> 'properties') as p
    ));
  end if;
  return private.rules_of(v_node);
end;
$$;

revoke all on function private.resolve_schema(jsonb, jsonb, text[])
from public, anon, authenticated, service_role;

-- What a union (anyOf, oneOf, an array of types) says: of one type and null, that type, nullable;
-- of enums, one enum; of several types, anyOf. Nothing if there is none.
create or replace function private.resolve_union(p_node jsonb, p_schemas jsonb, p_path text[])
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select
    case count(*) filter (where not o.is_null)
      when 0 then '{}'
      when 1 then jsonb_agg(o.rules) filter (where not o.is_null) -> 0
      else case
        when bool_and(o.rules ? 'enum') and count(distinct o.rules -> 'type') = 1
          then jsonb_build_object(
            'enum', jsonb_path_query_array(jsonb_agg(o.rules), '$[*].enum[*]')
          )
        else jsonb_build_object('anyOf', jsonb_agg(o.rules) filter (where not o.is_null))
      end
    end
    || case when bool_or(o.is_null) then '{"nullable": true}' else '{}'::jsonb end
  from (
    select
      private.resolve_schema(e.value, p_schemas, p_path) as rules,
      e.value ->> 'type' is not distinct from 'null' as is_null
    from jsonb_path_query(p_node, 'strict $.anyOf[*]', silent => true) as e (value)
    union all
    select
      private.resolve_schema(e.value, p_schemas, p_path),
      e.value ->> 'type' is not distinct from 'null'
    from jsonb_path_query(p_node, 'strict $.oneOf[*]', silent => true) as e (value)
    union all
    select private.rules_of(p_node || jsonb_build_object('type', e.value)), e.value = '"null"'
    from jsonb_path_query(p_node, 'strict $.type[*]', silent => true) as e (value)
    where jsonb_typeof(p_node -> 'type') = 'array'
  ) as o
$$;

revoke all on function private.resolve_union(jsonb, jsonb, text[])
from public, anon, authenticated, service_role;

-- A name as its words: imageURL, Image-URL and image_url are the same.
create or replace function private.snake_case(p_name text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select trim(both '_' from lower(regexp_replace(
    regexp_replace(p_name, '([a-z0-9])([A-Z])', '\1_\2', 'g'), '[^[:alnum:]]+', '_', 'g'
  )))
$$;

revoke all on function private.snake_case(text) from public, anon, authenticated, service_role;

-- The rules with limits where the provider left a size or a length of work open, and without a
-- default that does not fit or that an image input has: there, clients give paths.
create or replace function private.limit_rules(p_snake text, p_rules jsonb, p_takes_image boolean)
returns jsonb
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select l.rules - 'default' || case
    when p_takes_image or private.input_problem(l.rules -> 'default', l.rules) is not null then '{}'
    when l.rules ->> 'type' = 'integer'
      then jsonb_build_object('default', trunc((l.rules ->> 'default')::numeric))
    when l.rules ? 'default' then jsonb_build_object('default', l.rules -> 'default')
    else '{}'
  end
  from (
    select jsonb_strip_nulls(jsonb_build_object(
      'minimum', case when o.lowest is not null then least(o.lowest, d.number, b.highest) end,
      'maximum', case when o.highest is not null then greatest(o.highest, d.number, b.lowest) end
    )) || p_rules as rules
    from (
      select case jsonb_typeof(p_rules -> 'default')
        when 'number' then (p_rules ->> 'default')::numeric
      end as number
    ) as d
    cross join (
      select (p_rules ->> 'minimum')::numeric as lowest, (p_rules ->> 'maximum')::numeric as highest
    ) as b
    left join (
      values
      ('^((image|img|output|out|target|canvas|new|max)_)?(width|height)$', 64, 2048),
      ('(^|_)(width|height|resolution|dimensions?|side|pixels|(image|img|max|output)_size)$|^size$',
        null, 2048),
      ('^(up|out|re)?scal(e|ing)(_(factor|by|ratio))?$', 0, 10),
      ('(^|_)(megapixels?|mp)$', null, 4),
      ('(^|_)steps$', 0, 500)
    ) as o (pattern, lowest, highest)
      on p_snake ~ o.pattern and not p_rules ? 'enum'
      and p_rules ->> 'type' in ('integer', 'number')
    limit 1
  ) as l
$$;

revoke all on function private.limit_rules(text, jsonb, boolean)
from public, anon, authenticated, service_role;
