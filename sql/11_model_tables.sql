-- The catalogue: who makes pictures, and what can be asked for.
--
-- A provider is a row, so that the next one needs no release: where it is, and how to talk to it,
-- its recipe (93). What its answers mean is decided by read_answer (73), a function that anybody
-- can try with select; the worker sends what it is told to. The key itself is in the worker's
-- environment under the name given here, and goes to the provider's own hosts alone.
--
-- A model is a row, made of its provider's own schema (make import-model) or by hand; an alias is a
-- name that stands for one of several models. Models are data: nothing else refers to them by key.

create table private.providers (
  name text primary key,
  base_url text,
  secret text,
  key_hosts text[] not null default '{}',
  hosts text[] not null default '{}',
  max_running integer,
  result_ttl interval,
  lost_create text not null,
  settle interval not null default '20 seconds',
  buys_again boolean not null default false,
  is_active boolean not null default true,
  recipe jsonb,
  part integer,
  constraint providers_name_has_no_slash check (name ~ '^[a-z0-9_.-]+$'),
  constraint providers_base_url_is_an_address check (
    base_url ~ '^https?://[^\s/?#@]+(/[^\s?#]*[^\s?#/])?$'
  ),
  constraint providers_secret_is_the_name_of_a_key check (
    secret ~ '^[A-Z][A-Z0-9_]*_(KEY|TOKEN)$'
  ),
  constraint providers_lost_create_is_known check (lost_create in ('key', 'find', 'unknown')),
  constraint providers_max_running_is_positive check (max_running > 0),
  constraint providers_settle_is_not_long check (settle between '0' and '10 minutes'),
  constraint providers_recipe_creates_at_an_address check (
    recipe is null or base_url <> '' and recipe -> 'create' ->> 'url' <> ''
  )
);

comment on table private.providers is 'Who makes the pictures, and how to talk to them.';
comment on column private.providers.base_url is '{{base}} in the recipe.';
comment on column private.providers.secret is
  'Name of the variable of the worker''s environment that holds the key, …_KEY or …_TOKEN; null: '
  'none is needed. A worker takes jobs of those providers only whose key it has.';
comment on column private.providers.key_hosts is
  'Hosts of the provider''s API beside that of base_url, to which answers may lead and the key may '
  'go: names, or *.name for all below one.';
comment on column private.providers.hosts is
  'Hosts of outputs beside those of the API. The key does not go there.';
comment on column private.providers.max_running is
  'Jobs at once over all workers; null: as many as there are slots.';
comment on column private.providers.result_ttl is
  'How long outputs can be fetched after the end; null: not known.';
comment on column private.providers.lost_create is
  'What can be known of a create whose answer was lost: key (we name the job and can ask for it), '
  'find (it can be looked up by its whole input), unknown.';
comment on column private.providers.settle is
  'How long a lost create is looked for, where it can be, before it counts as not bought.';
comment on column private.providers.buys_again is
  'Where a lost create is unknown: create once more and perhaps pay twice; false: fail and refund.';
comment on column private.providers.recipe is
  '{headers, create, poll, result, cancel, find: {method, url, headers, body, and where in the '
  'answer: id, handles, state, outputs …}}: see docs/providers.md. null: the worker draws the '
  'pictures itself.';
comment on column private.providers.part is
  'How many of max_running this database may run, where several are one system (cells): they write '
  'it. Null: all.';

create table public.models (
  id text primary key,
  provider text not null references private.providers (name),
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
  input_template jsonb,
  outputs_path jsonpath,
  cost_usd numeric(12, 6),
  cost_unit text,
  is_schema_confirmed boolean not null default true,
  constraint models_id_is_owner_slash_name check (id ~ '^[a-z0-9_.-]+/[a-z0-9_.-]+$'),
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
  'What the provider calls the model: owner/name, owner/name:version, fal-ai/flux/dev.';
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
comment on column public.models.input_template is
  'What the provider is sent in place of the input, with {{input.name}} where a value of it goes: '
  'a graph for ComfyUI, say. What comes out null is left out.';
comment on column public.models.outputs_path is
  'Where the pictures are in the provider''s answer, in place of the outputs of its recipe, for a '
  'model that answers others too: a SQL/JSON path, in which $count is how many are asked for. '
  '$.output[last - $count + 1 to last] takes the last; null: the first of what the recipe finds.';
comment on column public.models.max_images is
  'Most images of one generation; what it charges where no input says how many.';
comment on column public.models.cost_usd is
  'US dollars the provider takes per cost_unit; null: not known.';
comment on column public.models.cost_unit is
  'image (each output) or second (of the provider''s compute).';
comment on column public.models.is_schema_confirmed is
  'False: input_schema was written from documentation, not imported from the provider.';

create table private.model_routes (
  model_id text references public.models (id) on delete cascade,
  place smallint,
  provider text not null references private.providers (name),
  provider_ref text not null,
  input_template jsonb,
  outputs_path jsonpath,
  cost_usd numeric(12, 6),
  cost_unit text,
  primary key (model_id, place),
  constraint model_routes_come_after_the_models_own check (place > 0),
  constraint model_routes_cost_has_a_unit check (
    (cost_usd is null) = (cost_unit is null) and cost_usd >= 0 and cost_unit in ('image', 'second')
  )
);

comment on table private.model_routes is
  'Other ways to a model, in order of place, for when the one in public.models does not serve. The '
  'user pays the model''s price whichever is taken.';

create index model_routes_provider_idx on private.model_routes (provider);

create view private.routes with (security_invoker = true) as
select
  id as model_id,
  0::smallint as place,
  id as breaker,
  provider,
  provider_ref,
  input_template,
  outputs_path,
  cost_usd,
  cost_unit
from public.models
union all
select
  model_id,
  place,
  model_id || '#' || place as breaker,
  provider,
  provider_ref,
  input_template,
  outputs_path,
  cost_usd,
  cost_unit
from private.model_routes;

comment on view private.routes is
  'All ways to each model. Place 0 is the one in public.models. breaker: the name of its own (28).';

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

create index models_provider_idx on public.models (provider);

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
