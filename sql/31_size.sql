-- Size: a width and height, or a shape, in the words the model knows.
--
-- Some models take pixels, some a ratio such as 16:9, some a size such as 1365x1024. map_size puts
-- the nearest the model knows in place of what it does not; what cannot be mapped stays as it is,
-- for check_params (32) to refuse. Nothing here refuses.

-- The option of the model's own sizes nearest to width and height: {property: option}; null if it
-- has none. Options are ratios such as 16:9, or sizes such as 1024x768; shape counts before area.
create function private.nearest_size(
  p_model public.models, p_width numeric, p_height numeric
) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(p.name, o.option)
  from unnest('{aspect_ratio,size,image_size,resolution}'::text[])
    with ordinality as p (name, place)
  cross join jsonb_array_elements_text(
    coalesce(p_model.input_schema #> array['properties', p.name, 'enum'], '[]')
  ) as o (option)
  cross join regexp_match(o.option, '^(\d{1,5}) ?[:x*×] ?(\d{1,5})$') as m
  where p.name = any (p_model.client_inputs) and m[1]::numeric > 0 and m[2]::numeric > 0
  order by
    p.place,
    abs(ln(m[1]::numeric / m[2]::numeric) - ln(p_width / p_height)),
    abs(ln(m[1]::numeric * m[2]::numeric) - ln(p_width * p_height))
  limit 1
$$;

-- The side nearest to this many pixels that a property allows: one of its enum, else a multiple of
-- 64, as diffusion models like it, within its limits.
create function private.fit_side(p_rules jsonb, p_pixels numeric) returns numeric
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select coalesce(
    (
      select e.value::numeric from jsonb_array_elements(p_rules -> 'enum') as e
      order by abs(e.value::numeric - p_pixels) limit 1
    ),
    least(
      floor(coalesce((p_rules ->> 'maximum')::numeric, 2048) / s.step) * s.step,
      greatest(
        ceil(coalesce((p_rules ->> 'minimum')::numeric, 64) / s.step) * s.step,
        round(p_pixels / s.step) * s.step
      )
    )
  )
  from (
    select case
      when 64 % coalesce((p_rules ->> 'multipleOf')::numeric, 1) = 0 then 64
      else (p_rules ->> 'multipleOf')::numeric
    end as step
  ) as s
$$;

-- Width and height of a shape for a model that wants pixels, with the area of its defaults.
create function private.pixels_of_shape(p_model public.models, p_shape numeric) returns jsonb
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select jsonb_build_object(
    'width', private.fit_side(p.w, sqrt(a.pixels * p_shape)),
    'height', private.fit_side(p.h, sqrt(a.pixels / p_shape))
  )
  from (values (
    p_model.input_schema #> '{properties,width}', p_model.input_schema #> '{properties,height}'
  )) as p (w, h)
  cross join lateral (
    select coalesce((p.w ->> 'default')::numeric, 1024)
      * coalesce((p.h ->> 'default')::numeric, 1024) as pixels
  ) as a
$$;

-- A number of the params if it can be a side of a picture, else null.
create function private.read_side(p_params jsonb, p_name text) returns numeric
language sql immutable set search_path = pg_catalog, pg_temp as $$
  select case jsonb_typeof(p_params -> p_name) when 'number' then (
    select n.side from (select (p_params ->> p_name)::numeric as side) as n
    where n.side % 1 = 0 and n.side between 1 and 16384
  ) end
$$;

-- The params with a size the model knows in place of one it does not. What cannot be mapped stays
-- as it is, for check_params to refuse.
create function private.map_size(p_model public.models, p_params jsonb) returns jsonb
language plpgsql immutable set search_path = pg_catalog, pg_temp as $$
declare
  v_takes_pixels boolean := p_model.client_inputs @> '{width,height}';
  v_width numeric := private.read_side(p_params, 'width');
  v_height numeric := private.read_side(p_params, 'height');
  v_ratio text[] := regexp_match(
    p_params ->> 'aspect_ratio', '^0*([1-9]\d{0,3}):0*([1-9]\d{0,3})$'
  );
  v_size jsonb;
begin
  if v_width is not null and v_height is not null and not v_takes_pixels then
    v_size := private.nearest_size(p_model, v_width, v_height);
    return case
      when v_size is null then p_params
      else v_size || (p_params - '{width,height}'::text[])
    end;
  elsif v_ratio is not null and not 'aspect_ratio' = any (p_model.client_inputs) then
    v_size := case
      when v_takes_pixels
        then private.pixels_of_shape(p_model, v_ratio[1]::numeric / v_ratio[2]::numeric)
      else private.nearest_size(p_model, v_ratio[1]::numeric, v_ratio[2]::numeric)
    end;
    return case when v_size is null then p_params else v_size || (p_params - 'aspect_ratio') end;
  elsif v_width is not null and v_height is not null then
    -- Some models look at pixels only when asked for a custom shape.
    select coalesce(jsonb_object_agg(c.name, 'custom'), '{}') into v_size
    from unnest('{aspect_ratio,size}'::text[]) as c (name)
    where p_model.input_schema #> array['properties', c.name, 'enum'] @> '["custom"]';
    return v_size || p_params;
  end if;
  return p_params;
end;
$$;
