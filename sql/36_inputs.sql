-- What a model's inputs are for, told by name, rules and prose: prompt, image, count, operator's.
--
-- Inputs that only an operator may set (safety switches, weights, secrets, anything that takes an
-- address) never become client inputs unless import_model is told so by name. Inputs that take an
-- image do: a client gives a path in bucket inputs, never an address. Where in doubt an input is
-- the operator's.

-- Takes text of any kind: names, paths and addresses too.
create or replace function private.is_free_text(p_rules jsonb)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select p_rules @? '$.** ? (@.type == "string" && !exists(@.enum))'
$$;

revoke all on function private.is_free_text(jsonb) from public, anon, authenticated, service_role;

-- Takes a file, as one or as a list.
create or replace function private.takes_file(p_rules jsonb)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select p_rules @? '$.**.format ? (@ like_regex "^(uri|url|uri-reference|iri|binary|byte|path)$")'
$$;

revoke all on function private.takes_file(jsonb) from public, anon, authenticated, service_role;

-- Takes source images: a file, or plain text where the name leaves no doubt.
create or replace function private.takes_image(p_snake text, p_rules jsonb, p_prose text)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select private.is_free_text(p_rules)
    and p_snake !~ '(^|_)(loras?|weights?|checkpoint|ckpt|zip|archive|dataset|prompt_file)(_|$)'
    and p_prose !~ '\m(zip|tar|tarball|safetensors|videos?|audio)\M'
    and (
      private.takes_file(p_rules) and (
        p_snake ~ '(image|img|mask|photo|picture|pic|face|pose|sketch|portrait|selfie|drawing)'
        or p_prose ~ '\m(images?|pictures?|photos?|photographs?|png|jpe?g|drawing|sketch|selfie)\M'
        or p_snake ~ '^(input|source|target|init|control|reference|subject|character|person|style)$'
      )
      or p_snake ~ concat(
        '^((input|source|src|init|start|init|reference|ref|base|style|control|target|mask|face)_)?',
        '(images?|imgs?|photos?|pictures?|mask)(_(\d+|path|file|input|urls?|uris?))?$'
      )
    )
$$;

revoke all on function private.takes_image(text, jsonb, text)
from public, anon, authenticated, service_role;

-- Is the operator's: by its name, by its type, or text that its prose calls an address.
create or replace function private.is_operators(p_snake text, p_rules jsonb, p_prose text)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select
    p_snake ~ concat(
      '(safe|nsfw|sfw|moderat|censor|watermark|content_(filter|check|policy)|filter_(level|words)',
      '|disable_filter|profan|explicit|adult|mature|nud(e|ity)|person_generation|guardrail)'
    )
    or p_snake ~ concat(
      '(^|_)(webhooks?|callbacks?|secrets?|password|passwd|credentials?|token',
      '|api|apikey|key|auth|authorization|bearer|urls?|uris?|hrefs?|links?|endpoint|proxy|host|hf',
      '|huggingface|civitai|replicate|openai|debug|workflow|kwargs|command|extra_args)(_|$)'
    )
    -- Whom the provider is to hold responsible is not for that person to say.
    or p_snake ~ concat(
      '(^|_)(end_?)?(users?|customers?|clients?|accounts?|members?|tenants?|visitors?|sessions?',
      '|devices?|requesters?|organi[sz]ations?|fingerprints?|e?mails?|usernames?|ip)',
      '(_?(u?u?ids?|identifi(er|cation)s?|names?|e?mails?|ip|address|hash(es)?|keys?|refs?',
      '|reference|tags?|tokens?|info|data|metadata))?$'
    )
    or private.is_free_text(p_rules) and p_snake !~ 'prompt'
    and p_prose ~ '\m(end|your)[- ]?(users?|customers?)\M'
    or private.takes_file(p_rules)
    or p_rules @? '$.**.format ? (@ == "password")'
    or p_rules @? '$.** ? (@.type == "object")'
    or p_rules @? '$.items ? (@.type == "array" || !exists(@.type))'
    or p_rules @? '$.anyOf[*] ? (!exists(@.type))'
    or p_rules ->> 'type' = 'array' and not p_rules ? 'items'
    or not p_rules ?| '{type,anyOf}'
    or p_snake ~ '^(image_|output_)?(size|resolution|dimensions?)$'
    and (p_rules ->> 'type' = 'array' or private.is_free_text(p_rules))
    or private.is_free_text(p_rules) and p_snake !~ 'prompt' and (
      p_prose ~ '\m(urls?|uris?|hyperlink|hugging ?face|civitai|safetensors|api key)\M'
      or p_snake ~ concat(
        '(^|_)(model|repo|path|file|filename|dir|directory|folder|zip|tar|adapter|embeddings?',
        '|loras?|qlora|weights?|checkpoints?|ckpt|json|yaml|config|script|bucket)(_|$)'
      )
    )
$$;

revoke all on function private.is_operators(text, jsonb, text)
from public, anon, authenticated, service_role;

-- The properties of a model's input, in the order of their names.
--
-- Raises: PT400 invalid_input for a reference that cannot be resolved.
create or replace function private.model_properties(p_schemas jsonb)
returns table (
  name text,
  snake text,
  rules jsonb,
  is_required boolean,
  takes_image boolean,
  is_operators boolean
)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select
    p.key,
    s.snake,
    private.limit_rules(s.snake, s.rules, i.takes_image),
    coalesce((p_schemas #> '{Input,required}') ? p.key, false),
    i.takes_image,
    private.is_operators(s.snake, s.rules, s.prose)
  from jsonb_each(p_schemas #> '{Input,properties}') as p
  cross join lateral (
    select
      private.snake_case(p.key) as snake,
      private.resolve_schema(p.value, p_schemas) - 'properties' as rules,
      -- What a link points to is not what the input takes.
      regexp_replace(
        lower(coalesce(p.value ->> 'description', '')), 'https?://\S+', '', 'g'
      ) as prose
  ) as s
  cross join lateral (
    select private.takes_image(s.snake, s.rules, s.prose) as takes_image
  ) as i
  order by p.key
$$;

revoke all on function private.model_properties(jsonb)
from public, anon, authenticated, service_role;

-- The property the prompt goes into: by its name, or the one required text that is called so.
-- Names that say little count where the model cannot do without, or is given nothing else.
create or replace function private.find_prompt(p_schemas jsonb)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select p.name
  from private.model_properties(p_schemas) as p
  left join unnest(
    '{prompt,text_prompt,prompt_text,input_prompt,positive_prompt,user_prompt,main_prompt,prompts,'
    'edit_prompt,prompt_1,prompt1,instruction,instructions,edit_instruction,positive,text,'
    'input_text,text_input,caption,description,query,message,input,content}'::text[]
  ) with ordinality as c (snake, place) on c.snake = p.snake
  where p.rules ->> 'type' = 'string' and not p.rules ?| '{enum,format}' and not p.takes_image
    and (
      p.snake ~ 'prompt'
      and p.snake !~ '(negative|neg|^n_|system|style|lora|suffix|prefix|2|strength)'
      or c.place is not null and (p.is_required or not exists (
        select from private.model_properties(p_schemas) as i where i.takes_image
      ))
    )
  order by c.place, p.is_required desc, p.name limit 1
$$;

revoke all on function private.find_prompt(jsonb) from public, anon, authenticated, service_role;

-- Whether an input says how many images are made. Only one of a model's may be a client's: what
-- the others multiply is not charged.
create or replace function private.counts_images(p_snake text, p_rules jsonb)
returns boolean
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
  select not private.is_free_text(p_rules) and p_snake ~ concat(
    '^(n|amount|quantity|outputs|samples|variations|batch|n_iter|max_images',
    '|(num|number|n|no|count|amount|total|nb)_(of_)?(output|generated|result)?_?',
    '(image|output|sample|picture|result|generation|variation|variant|prediction|batche?)s?',
    '(_per_[a-z]+)?',
    '|(image|output|sample|batch|picture|result|variation|generation)s?_(count|num|number|size|n)',
    '|(images|samples)_per_prompt)$'
  )
$$;

revoke all on function private.counts_images(text, jsonb)
from public, anon, authenticated, service_role;

-- The input that says how many images, and its rules with limits we can charge by; else nothing.
create or replace function private.find_count(p_schemas jsonb)
returns table (name text, rules jsonb)
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
  select p.name, case
    when p.rules ? 'enum' then p.rules - 'nullable' || jsonb_build_object(
      'default', coalesce(p.rules -> 'default', p.rules -> 'enum' -> 0)
    )
    else p.rules - '{nullable,exclusiveMinimum,exclusiveMaximum}'::text[] || jsonb_build_object(
      'minimum', l.lowest,
      'maximum', greatest(l.lowest, least(16, coalesce(
        (p.rules ->> 'maximum')::numeric, greatest(4, (p.rules ->> 'default')::numeric)
      ))),
      'default', least(16, greatest(l.lowest, (p.rules ->> 'default')::numeric))
    )
  end
  from private.model_properties(p_schemas) as p
  cross join lateral (
    select least(16, greatest(1, (p.rules ->> 'minimum')::numeric)) as lowest
  ) as l
  left join unnest(
    '{num_outputs,number_of_outputs,number_of_images,num_images,num_images_per_prompt,n_images,'
    'images_per_prompt,num_samples,n_samples,samples,n,max_images,batch_size}'::text[]
  ) with ordinality as c (snake, place) on c.snake = p.snake
  where p.rules ->> 'type' = 'integer' and private.counts_images(p.snake, p.rules)
    and not p.is_operators
  order by c.place, p.name limit 1
$$;

revoke all on function private.find_count(jsonb) from public, anon, authenticated, service_role;
