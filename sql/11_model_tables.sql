-- The catalogue: what can be asked for.
--
-- A model is a row, made of its provider's own schema (make import-model) or by hand; an alias is a
-- name that stands for one of several models. Models are data: nothing else refers to them by key.

create table public.models (
  id text primary key,
  provider text not null,
  provider_ref text not null,
  title text not null,
  price_credits integer not null,
  paid_price_credits integer not null,
  requires_paid boolean not null default false,
  is_active boolean not null default true,
  input_schema jsonb not null,
  default_input jsonb not null default '{}',
  required_inputs text[] not null default '{}',
  lowest_seed bigint,
  highest_seed bigint,
  client_inputs text[] not null,
  prompt_input text default 'prompt',
  image_inputs text[] not null default '{}',
  image_count_input text,
  operator_input jsonb not null default '{}',
  max_images smallint not null default 1,
  deadline interval not null default '5 minutes',
  cost_usd numeric(12, 6),
  cost_unit text,
  is_schema_confirmed boolean not null default true,
  constraint models_id_is_owner_slash_name check (id ~ '^[a-z0-9_.-]+/[a-z0-9_.-]+$'),
  constraint models_provider_is_known check (provider in ('preview', 'replicate')),
  constraint models_prices_are_not_negative check (price_credits >= 0 and paid_price_credits >= 0),
  -- With 16 images and 100 jobs of a batch it is an integer still.
  constraint models_prices_are_at_most_a_million check (
    greatest(price_credits, paid_price_credits) <= 1000000
  ),
  constraint models_input_schema_has_properties check (
    coalesce(jsonb_typeof(input_schema -> 'properties'), '') = 'object'
  ),
  constraint models_prompt_input_is_no_client_input check (not prompt_input = any(client_inputs)),
  constraint models_image_inputs_are_client_inputs check (client_inputs @> image_inputs),
  constraint models_operator_input_is_an_object check (jsonb_typeof(operator_input) = 'object'),
  constraint models_cost_has_a_unit check (
    (cost_usd is null) = (cost_unit is null) and cost_usd >= 0 and cost_unit in ('image', 'second')
  ),
  constraint models_image_count_input_is_a_client_input check (
    image_count_input is null or image_count_input = any(client_inputs)
  ),
  constraint models_max_images_is_sane check (max_images between 1 and 16),
  constraint models_deadline_is_positive check (deadline > interval '0')
);

comment on table public.models is
  'The catalogue: what can be asked for, at what price, run by whom.';
comment on column public.models.provider_ref is
  'What the provider calls the model: owner/name, or owner/name:version.';
comment on column public.models.price_credits is 'Credits per image for a free user.';
comment on column public.models.paid_price_credits is
  'Credits per image for a paid user; 0 means included in the plan.';
comment on column public.models.input_schema is
  'JSON schema of the provider''s input: {"properties": {name: {type, minimum, maximum, enum, '
  'default}}}.';
comment on column public.models.default_input is
  'What input_schema gives for what nobody says. This and the next three are kept by a trigger.';
comment on column public.models.required_inputs is
  'The client inputs that nobody else gives a value.';
comment on column public.models.lowest_seed is
  'From here to highest_seed a seed is chosen where nobody says one; null: the model has none.';
comment on column public.models.image_inputs is
  'The client inputs that take source images: paths in bucket inputs, which the worker signs.';
comment on column public.models.image_count_input is
  'The client input that says how many images; null: none does, and max_images are charged until '
  'they are counted.';
comment on column public.models.operator_input is
  'Sent with every job, over defaults and params; clients cannot change it.';
comment on column public.models.max_images is
  'Most images of one generation; what it charges where no input says how many.';
comment on column public.models.cost_usd is
  'US dollars the provider takes per cost_unit; null: not known.';
comment on column public.models.cost_unit is
  'image (each output) or second (of the provider''s compute).';
comment on column public.models.is_schema_confirmed is
  'False: input_schema was written from documentation, not imported from the provider.';

-- Taken out once, not in every request. A seed is chosen (32), not taken from the schema.
create function private.set_derived_inputs() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  new.default_input := (
    select coalesce(jsonb_object_agg(p.key, p.value -> 'default'), '{}')
    from jsonb_each(new.input_schema -> 'properties') as p
    where p.value ? 'default' and not (p.key = 'seed' and p.value ->> 'type' = 'integer')
  );
  new.required_inputs := array(
    select i.name from unnest(new.client_inputs) as i (name)
    where new.input_schema -> 'required' ? i.name and i.name <> 'seed'
      and not new.input_schema #> array['properties', i.name] ? 'default'
      and not new.operator_input ? i.name
  );
  new.lowest_seed := null;
  new.highest_seed := null;
  if new.input_schema #>> '{properties,seed,type}' = 'integer' then
    new.lowest_seed := greatest(
      0, (new.input_schema #>> '{properties,seed,minimum}')::numeric
    );
    new.highest_seed := least(
      2147483647, (new.input_schema #>> '{properties,seed,maximum}')::numeric
    );
  end if;
  return new;
end;
$$;

create trigger models_set_derived_inputs
before insert or update on public.models
for each row execute function private.set_derived_inputs();

create table public.model_aliases (
  id text,
  model_id text references public.models (id) on delete cascade,
  weight integer not null default 1,
  primary key (id, model_id),
  constraint model_aliases_id_is_owner_slash_name check (id ~ '^[a-z0-9_.-]+/[a-z0-9_.-]+$'),
  constraint model_aliases_weight_is_not_negative check (weight >= 0)
);

comment on table public.model_aliases is
  'Names that stand for one of several models, to try them against each other: one row for each '
  'arm. A user stays with one arm while the weights stay and it is not paused.';
comment on column public.model_aliases.id is
  'What clients ask for, auto/fast say. A model of that name goes first.';
comment on column public.model_aliases.weight is
  'Share of the users against the weights of the other arms; 0: none.';

create index model_aliases_model_id_idx on public.model_aliases (model_id);
