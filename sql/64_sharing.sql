-- Sharing: single images that everybody may see, and who likes them.
--
-- A shared image has a share_id. It is then in list_public_images for everybody, signed in or not,
-- and its file and preview can be read in Storage (policy in 20). Of the generation nothing else is
-- shown but the model, and the prompt only if the owner says so. The path names the owner and the
-- generation by their ids: they open nothing, but tell which images are of the same owner.
--
-- What has been public may have been copied. Ending a share ends new downloads; an address that
-- was signed meanwhile works until it expires or the file is erased.
--
-- image_position, not position, which some gateways would have to quote and do not.

-- An image that is shared already keeps its place in the feed.
--
-- Locks: the generation, the image.
-- Raises: PT400 invalid_input, PT401 not_authenticated, PT404 not_found.
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

-- Likes of an image, counted up to p_at_most: a page with popular images must not read them all.
create function private.count_likes(
  p_job_id uuid, p_position integer, p_at_most integer default 1000
) returns integer
language sql stable set search_path = pg_catalog, pg_temp as $$
  select count(*)::integer
  from (
    select 1 from public.image_likes as l
    where l.generation_id = p_job_id and l.position = p_position
    limit p_at_most
  ) as likes
$$;

-- Raises: PT400 invalid_input, PT401 not_authenticated, PT404 not_found.
create function private.like_image(
  p_job_id uuid, p_position integer, p_is_liked boolean
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
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
  end if;
  if p_is_liked then
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

-- One shared image as everybody sees it.
create function private.shared_image_json(p_image public.images, p_user_id uuid) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'share_id', p_image.share_id,
    'job_id', p_image.generation_id,
    'position', p_image.position,
    'path', p_image.storage_path,
    'preview_path', p_image.preview_path,
    'content_type', p_image.content_type,
    'width', p_image.width,
    'height', p_image.height,
    'bytes', p_image.bytes,
    'blurhash', p_image.blurhash,
    'model', g.model_id,
    'prompt', case when p_image.shows_prompt then g.prompt end,
    'created_at', p_image.created_at,
    'like_count', private.count_likes(p_image.generation_id, p_image.position),
    'is_liked', exists (
      select from public.image_likes as l
      where l.generation_id = p_image.generation_id
        and l.position = p_image.position and l.user_id = p_user_id
    ),
    'is_own', coalesce(p_image.user_id = p_user_id, false)
  )
  from public.generations as g
  where g.id = p_image.generation_id
$$;

-- Raises: PT400 invalid_input, PT401 not_authenticated.
create function private.list_public_images(p_before uuid, p_page_size integer) returns json
language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.caller_id();
  v_before uuid := coalesce(p_before, 'ffffffff-ffff-ffff-ffff-ffffffffffff');
  v_answer json;
begin
  perform private.check_page_size(p_page_size);
  select json_build_object(
    'images', coalesce(
      json_agg(
        private.shared_image_json(page.image, v_user_id) order by (page.image).share_id desc
      ),
      '[]'
    ),
    'next_before', case count(*) when p_page_size
      then (array_agg((page.image).share_id order by (page.image).share_id))[1]
    end
  ) into v_answer
  from (
    select i as image
    from public.images as i
    where i.share_id is not null and i.share_id < v_before
    order by i.share_id desc limit p_page_size
  ) as page;
  return v_answer;
end;
$$;
