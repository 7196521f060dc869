-- Gallery: favorites, tags, sharing with likes, and prompt templates. An optional part: of what is
-- before it, 58 has the one question that it answers here.
--
-- None of it touches the queue or money, and none of it is a change of state that would be
-- broadcast. Each function locks the generation first, so that two devices of one user cannot mix
-- their changes. Nothing counts likes: they are counted when read, so that a popular image is no
-- row that everybody waits for.
--
-- A shared image has a share_id. It is then in list_public_images for everybody, signed in or not,
-- and its file and preview can be read in Storage. Of the generation nothing else is shown but the
-- model, and the prompt only if the owner says so. The path names the owner and the generation by
-- their ids: they open nothing, but tell which images are of the same owner. What has been public
-- may have been copied. Ending a share ends new downloads; an address that was signed meanwhile
-- works until it expires or the file is erased.

create table public.generation_tags (
  user_id uuid not null,
  tag text not null,
  generation_id uuid not null,
  primary key (user_id, tag, generation_id),
  constraint generation_tags_tag_is_short check (length(tag) between 1 and 50)
);

comment on table public.generation_tags is
  'A user''s own words on their generations. The key is the order list_generations walks.';
comment on column public.generation_tags.tag is 'In lower case, with single spaces.';

create index generation_tags_generation_id_idx on public.generation_tags (generation_id);

create table public.image_likes (
  generation_id uuid not null,
  position smallint not null,
  user_id uuid not null,
  created_at timestamptz not null default now(),
  primary key (generation_id, position, user_id)
);

comment on table public.image_likes is
  'Who likes which shared image. Likes outlast the end of a share, unseen, and end with the image.';

create index image_likes_user_id_idx on public.image_likes (user_id);

-- For the public feed, and for the policy on the files.
create index images_share_id_idx on public.images (share_id) where share_id is not null;
create index images_shared_path_idx on public.images (storage_path) where share_id is not null;
create index images_shared_preview_idx on public.images (preview_path) where share_id is not null;

create table public.prompt_templates (
  -- Not uuid_v7: the operator's backend inserts here, and has no rights in schema private.
  id uuid primary key default gen_random_uuid(),
  user_id uuid,
  title text not null,
  prompt text not null,
  model_id text,
  params jsonb not null default '{}',
  created_at timestamptz not null default now(),
  constraint prompt_templates_title_is_short check (length(title) between 1 and 100),
  constraint prompt_templates_model_is_short check (length(model_id) between 1 and 100),
  constraint prompt_templates_params_are_an_object check (jsonb_typeof(params) = 'object')
);

comment on table public.prompt_templates is 'Prompts to start from.';
comment on column public.prompt_templates.user_id is
  'Whose it is; null: the app''s, for everybody.';
comment on column public.prompt_templates.prompt is
  'May hold {placeholders}, which the app fills in before it enqueues.';
comment on column public.prompt_templates.model_id is
  'A model or an alias; null: the app''s choice. Checked when it is asked for, as are the params.';

create index prompt_templates_user_id_idx on public.prompt_templates (user_id);

-- Who may read what.

alter table public.generation_tags enable row level security;
alter table public.image_likes enable row level security;
alter table public.prompt_templates enable row level security;

revoke all on table public.generation_tags, public.image_likes, public.prompt_templates
from public, anon, authenticated, service_role;
grant select on table public.generation_tags, public.image_likes to authenticated, service_role;
grant select on table public.prompt_templates to authenticated;
grant select, insert, update, delete on table public.prompt_templates to service_role;

-- As the policy on images: the tags of a deleted generation are hidden with it.
create policy "Users read their own tags" on public.generation_tags
for select to authenticated using (
  user_id = (select private.caller_id())
  and exists (
    select from public.generations as g
    where g.id = generation_tags.generation_id
  )
);

create policy "Users read their own likes" on public.image_likes
for select to authenticated using (user_id = (select private.caller_id()));

create policy "Users read their own prompt templates" on public.prompt_templates
for select to authenticated using (user_id = (select private.caller_id()));

-- Not by the rights of who asks, for a policy below looks into it for everybody: where one file is
-- asked for by an index, where the bucket is listed once for all of its files. A function would be
-- called for each of them.
create view private.shared_paths as
select i.storage_path as path from public.images as i
where i.share_id is not null
union all
select i.preview_path as path from public.images as i
where i.share_id is not null;

comment on view private.shared_paths is
  'Files and previews of shared images in bucket generations, as list_public_images shows them.';

revoke all on private.shared_paths from public, anon, authenticated, service_role;
grant select on private.shared_paths to anon, authenticated;

do $do$
declare
  v_policy text := $policy$
  create policy "Everybody reads shared images" on storage.objects
  for select to anon, authenticated using (
    bucket_id = 'generations'
    and exists (select from private.shared_paths as s where s.path = objects.name)
  );
$policy$;
begin
  if to_regclass('storage.objects') is not null then
    execute v_policy;
  end if;
exception when insufficient_privilege then
  raise notice 'Darkroom: no right to make policies on storage.objects; until its owner, or '
    'Supabase''s SQL editor, has run this, nobody sees what others share: %', v_policy;
end;
$do$;

-- What goes when something else goes.

-- What is deleted is private again, in the same moment, and stays so if it is restored. Its
-- generation is locked, or an image could be shared meanwhile.
create function private.end_shares() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update public.images set share_id = null, shows_prompt = false
  where generation_id = new.id and share_id is not null;
  return null;
end;
$$;

create trigger generations_end_shares after update of deleted_at on public.generations
for each row when (old.deleted_at is null and new.deleted_at is not null)
execute function private.end_shares();

create function private.erase_gallery_of_generation() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.image_likes where generation_id = old.id;
  delete from public.generation_tags where generation_id = old.id;
  return null;
end;
$$;

create trigger generations_erase_gallery after delete on public.generations
for each row execute function private.erase_gallery_of_generation();

create function private.erase_gallery_of_user() returns trigger
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  delete from public.image_likes where user_id = old.user_id;
  delete from public.prompt_templates where user_id = old.user_id;
  return null;
end;
$$;

create trigger entitlements_erase_gallery after delete on public.entitlements
for each row execute function private.erase_gallery_of_user();

-- What both like, the one who stays has liked already.
create function private.move_gallery() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  update public.generation_tags set user_id = new.into_id where user_id = new.user_id;
  update public.prompt_templates set user_id = new.into_id where user_id = new.user_id;
  with moved as (delete from public.image_likes as l where l.user_id = new.user_id returning l.*)
  insert into public.image_likes (generation_id, position, user_id, created_at)
  select m.generation_id, m.position, new.into_id, m.created_at from moved as m
  on conflict do nothing;
  return null;
end;
$$;

create trigger merged_users_move_gallery after insert on private.merged_users
for each row execute function private.move_gallery();

-- What the rest asks (58).

create or replace function private.walk_tag(
  p_user_id uuid, p_tag text, p_before uuid, p_at_most integer
) returns uuid[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  return array(
    select t.generation_id from public.generation_tags as t
    where t.user_id = p_user_id and t.tag = p_tag and t.generation_id < p_before
    order by t.generation_id desc limit p_at_most
  );
end;
$$;

-- Favorites and tags.

-- Locks: the generation.
create function private.set_favorite(p_job_id uuid, p_is_favorite boolean) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.lock_own_generation(p_job_id);
  if p_is_favorite is null then
    perform private.refuse_input('is_favorite: neither true nor false');
  end if;
  update public.generations set is_favorite = p_is_favorite
  where id = p_job_id and is_favorite <> p_is_favorite;
  return json_build_object('job_id', p_job_id, 'is_favorite', p_is_favorite);
end;
$$;

-- Locks: the generation.
create function private.set_tags(p_job_id uuid, p_tags text[]) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_generation public.generations := private.lock_own_generation(p_job_id);
  v_tags text[];
begin
  if (cardinality(p_tags) <= 20) is not true then
    perform private.refuse_input('tags: not a list of at most 20');
  end if;
  v_tags := array(
    select distinct private.read_tag('tags', t.tag) from unnest(p_tags) as t (tag) order by 1
  );
  delete from public.generation_tags where generation_id = p_job_id and tag <> all (v_tags);
  insert into public.generation_tags (user_id, tag, generation_id)
  select v_generation.user_id, t.tag, p_job_id from unnest(v_tags) as t (tag)
  on conflict do nothing;
  update public.generations set tags = v_tags where id = p_job_id and tags <> v_tags;
  return json_build_object('job_id', p_job_id, 'tags', v_tags);
end;
$$;

create function public.set_favorite(job_id uuid, is_favorite boolean default true) returns json
language sql set search_path = pg_catalog, pg_temp
return private.set_favorite(job_id, is_favorite);

comment on function public.set_favorite is
  'Makes one of your generations a favorite, or no longer one: {job_id, is_favorite}. Errors: '
  'PT400 invalid_input, PT401 not_authenticated, PT404 not_found.';

create function public.set_tags(job_id uuid, tags text[]) returns json
language sql set search_path = pg_catalog, pg_temp
return private.set_tags(job_id, tags);

comment on function public.set_tags is
  'Gives one of your generations these tags in place of those it had: at most 20, of 1 to 50 '
  'characters, kept in lower case. Answers {job_id, tags}. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT404 not_found.';

-- Sharing and likes. image_position, not position, which some gateways would have to quote and do
-- not.

-- Raises PT404 not_found, the same for an image that never was and one that is not shared.
create function private.refuse_unknown_image() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.refuse_missing(
    'image_position: no such image of this job',
    'Use job_id and position as the list of images shows them.'
  );
end;
$$;

-- An image that is shared already keeps its place in the feed.
--
-- Locks: the generation, the image.
create function private.share_image(
  p_job_id uuid, p_position integer, p_is_public boolean, p_shows_prompt boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_image public.images;
begin
  perform private.lock_own_generation(p_job_id);
  if p_is_public is null or p_shows_prompt is null then
    perform private.refuse_input('is_public, shows_prompt: neither true nor false');
  end if;
  update public.images set
    share_id = case when p_is_public then coalesce(share_id, private.uuid_v7()) end,
    shows_prompt = p_is_public and p_shows_prompt
  where generation_id = p_job_id and position = p_position
  returning * into v_image;
  if not found then
    perform private.refuse_unknown_image();
  end if;
  return json_build_object(
    'job_id', p_job_id, 'position', p_position, 'share_id', v_image.share_id,
    'is_public', v_image.share_id is not null, 'shows_prompt', v_image.shows_prompt
  );
end;
$$;

-- Likes of an image, counted up to p_at_most: a page with popular images must not read them all.
create function private.count_likes(
  p_job_id uuid, p_position integer, p_at_most integer default 1000
) returns integer
language sql stable set search_path = pg_catalog, pg_temp as $$
  select count(*)::integer
  from (
    select 1 from public.image_likes as l
    where l.generation_id = p_job_id and l.position = p_position limit p_at_most
  ) as likes
$$;

-- Of whoever asks: that the user is there was checked before.
create function private.like_shared_image(
  p_job_id uuid, p_position integer, p_is_liked boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_user_id(p_writes => true);
  v_image public.images;
begin
  if p_is_liked is null then
    perform private.refuse_input('is_liked: neither true nor false');
  end if;
  select * into v_image from public.images
  where generation_id = p_job_id and position = p_position and share_id is not null
  for key share;  -- no like outlives its image
  if not found then
    perform private.refuse_unknown_image();
  elsif p_is_liked then
    insert into public.image_likes (generation_id, position, user_id)
    values (p_job_id, v_image.position, v_user_id)
    on conflict do nothing;
  else
    delete from public.image_likes
    where generation_id = p_job_id and position = p_position and user_id = v_user_id;
  end if;
  return json_build_object(
    'job_id', p_job_id, 'position', p_position,
    'is_liked', p_is_liked, 'like_count', private.count_likes(p_job_id, p_position)
  );
end;
$$;

create function private.like_image(
  p_job_id uuid, p_position integer, p_is_liked boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
begin
  perform private.require_known_user_id(p_writes => true);
  return private.like_shared_image(p_job_id, p_position, p_is_liked);
end;
$$;

create function private.list_public_images(p_before uuid, p_page_size integer) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.caller_id();
  v_answer json;
begin
  perform private.check_page_size(p_page_size);
  select json_build_object(
    'images', coalesce(json_agg(json_build_object(
      'share_id', i.share_id, 'job_id', i.generation_id, 'position', i.position,
      'path', i.storage_path, 'preview_path', i.preview_path, 'content_type', i.content_type,
      'width', i.width, 'height', i.height, 'bytes', i.bytes, 'blurhash', i.blurhash,
      'model', i.model_id,
      'prompt', case when i.shows_prompt then i.prompt end,
      'created_at', i.created_at,
      'like_count', private.count_likes(i.generation_id, i.position),
      'is_liked', exists (
        select from public.image_likes as l
        where l.generation_id = i.generation_id and l.position = i.position
          and l.user_id = v_user_id
      ),
      'is_own', coalesce(i.user_id = v_user_id, false)
    ) order by i.share_id desc), '[]'),
    'next_before', case count(*) when p_page_size
      then (array_agg(i.share_id order by i.share_id))[1]
    end
  ) into v_answer
  from (
    select shared.*, g.model_id, g.prompt
    from (
      select * from public.images
      where share_id < coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
      order by share_id desc limit p_page_size
    ) as shared
    cross join lateral (
      select model_id, prompt from public.generations where id = shared.generation_id limit 1
    ) as g
  ) as i;
  return v_answer;
end;
$$;

create function public.share_image(
  job_id uuid, image_position integer default 0, is_public boolean default true,
  shows_prompt boolean default false
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.share_image(job_id, image_position, is_public, shows_prompt);

comment on function public.share_image is
  'Shows one of your images to everybody, with its prompt if shows_prompt, or no longer: {job_id, '
  'position, share_id, is_public, shows_prompt}. Errors: PT400 invalid_input, PT401 '
  'not_authenticated, PT404 not_found.';

create function public.like_image(
  job_id uuid, image_position integer default 0, is_liked boolean default true
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.like_image(job_id, image_position, is_liked);

comment on function public.like_image is
  'Likes a shared image, once however often it is called, or no longer: {job_id, position, '
  'is_liked, like_count (up to 1000)}. Errors: PT400 invalid_input, PT401 not_authenticated, PT404 '
  'not_found.';

create function public.list_public_images(
  before uuid default null, page_size integer default 20
) returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_public_images(before, page_size);

comment on function public.list_public_images is
  'Shared images of all users, last shared first: {images [{share_id, job_id, position, path and '
  'preview_path in bucket generations, content_type, width, height, bytes, blurhash, model, prompt '
  '(null unless shared with it), created_at, like_count (up to 1000), is_liked and is_own (by you)'
  '}], next_before}. The next page is what comes before next_before; null: there is none. '
  'page_size: 1 to 100. Errors: PT400 invalid_input.';

-- Templates. Users write theirs with save_prompt_template. The app's are rows without user_id,
-- which the operator's backend writes into the table. Placeholders like {animal} are for the app to
-- fill in: what it enqueues is a finished prompt, and only then are model and params checked.

-- One template as the API shows it, with the placeholders in the order of their names.
--
-- Raises PT404 not_found, also for templates of others and of the app: the change that is to show
-- it met none.
create function private.template_json(p_template public.prompt_templates) returns json
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if p_template.id is null then
    perform private.refuse_missing(
      'id: no such template of yours', 'list_prompt_templates() names them.'
    );
  end if;
  return json_build_object(
    'id', p_template.id, 'is_own', p_template.user_id is not null,
    'title', p_template.title, 'prompt', p_template.prompt,
    'placeholders', array(
      select distinct m.names[1]
      from regexp_matches(p_template.prompt, '\{(\w+)\}', 'g') as m (names) order by 1
    ),
    'model', p_template.model_id, 'params', p_template.params,
    'created_at', p_template.created_at
  );
end;
$$;

create function private.save_prompt_template(
  p_title text, p_prompt text, p_model text, p_params jsonb, p_id uuid
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
  v_params jsonb := private.read_request(array[p_prompt], p_params, null);
  v_template public.prompt_templates;
begin
  if private.is_blank(p_prompt) then
    perform private.refuse_input('prompt: empty');
  elsif octet_length(p_title) > 400 or length(p_title) > 100 or private.is_blank(p_title) then
    perform private.refuse_input('title: not 1 to 100 characters');
  elsif octet_length(p_model) not between 1 and 100 then
    perform private.refuse_input('model: not 1 to 100 bytes');
  elsif p_id is not null then
    update public.prompt_templates
    set title = p_title, prompt = p_prompt, model_id = p_model, params = v_params
    where id = p_id and user_id = v_user_id
    returning * into v_template;
  elsif (select count(*) >= 100 from public.prompt_templates where user_id = v_user_id) then
    -- Not exact for one who saves many in the same moment; what matters is that there is an end.
    perform private.refuse_input('title: you have 100 templates', 'Delete one first.');
  else
    insert into public.prompt_templates (user_id, title, prompt, model_id, params)
    values (v_user_id, p_title, p_prompt, p_model, v_params)
    returning * into v_template;
  end if;
  return private.template_json(v_template);
end;
$$;

create function private.delete_prompt_template(p_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
  v_template public.prompt_templates;
begin
  delete from public.prompt_templates where id = p_id and user_id = v_user_id
  returning * into v_template;
  return json_build_object('id', private.template_json(v_template) -> 'id');
end;
$$;

create function private.list_prompt_templates() returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id();
begin
  return (
    select coalesce(
      json_agg(private.template_json(t) order by t.user_id is null, t.created_at desc, t.id), '[]'
    )
    from public.prompt_templates as t
    where t.user_id = v_user_id or t.user_id is null
  );
end;
$$;

create function public.save_prompt_template(
  title text, prompt text, model text default null, params jsonb default '{}', id uuid default null
) returns json
language sql set search_path = pg_catalog, pg_temp
return private.save_prompt_template(title, prompt, model, params, id);

comment on function public.save_prompt_template is
  'Keeps a prompt to start from, or changes the one with this id; at most 100. Answers as '
  'list_prompt_templates shows it. Errors: PT400 invalid_input, PT401 not_authenticated, PT404 '
  'not_found.';

create function public.delete_prompt_template(id uuid) returns json
language sql set search_path = pg_catalog, pg_temp
return private.delete_prompt_template(id);

comment on function public.delete_prompt_template is
  'Deletes one of your prompt templates: {id}. Errors: PT401 not_authenticated, PT404 not_found.';

create function public.list_prompt_templates() returns json
language sql stable set search_path = pg_catalog, pg_temp
return private.list_prompt_templates();

comment on function public.list_prompt_templates is
  'Prompts to start from, your own and then the app''s, newest first: [{id, is_own, title, prompt, '
  'placeholders [names in braces], model (null: any), params, created_at}]. Errors: PT401 '
  'not_authenticated.';

insert into private.exported_tables (name) values
('public.image_likes'), ('public.prompt_templates');

-- Who may call what: as in 92, what is not named here nobody may call.

revoke all on function
private.count_likes, private.delete_prompt_template, private.end_shares,
private.erase_gallery_of_generation, private.erase_gallery_of_user, private.like_image,
private.like_shared_image, private.list_prompt_templates, private.list_public_images,
private.move_gallery, private.refuse_unknown_image, private.save_prompt_template,
private.set_favorite, private.set_tags, private.share_image, private.template_json,
public.delete_prompt_template, public.like_image, public.list_prompt_templates,
public.list_public_images, public.save_prompt_template, public.set_favorite, public.set_tags,
public.share_image
from public, anon, authenticated, service_role;

grant execute on function
private.delete_prompt_template, private.like_image, private.list_prompt_templates,
private.list_public_images, private.save_prompt_template, private.set_favorite, private.set_tags,
private.share_image,
public.delete_prompt_template, public.like_image, public.list_prompt_templates,
public.list_public_images, public.save_prompt_template, public.set_favorite, public.set_tags,
public.share_image
to anon, authenticated;

notify pgrst, 'reload schema';
