-- Prompt templates: prompts to start from, a user's own and the app's.
--
-- Users write theirs with save_prompt_template. The app's are rows without user_id, which the
-- operator's backend writes into the table. Placeholders like {animal} are for the app to fill in:
-- what it enqueues is a finished prompt, and only then are model and params checked.

-- One template as the API shows it, with the placeholders in the order of their names.
create function private.template_json(p_template public.prompt_templates) returns json
language sql stable set search_path = pg_catalog, pg_temp as $$
  select json_build_object(
    'id', p_template.id,
    'is_own', p_template.user_id is not null,
    'title', p_template.title,
    'prompt', p_template.prompt,
    'placeholders', array(
      select distinct m.names[1]
      from regexp_matches(p_template.prompt, '\{(\w+)\}', 'g') as m (names) order by 1
    ),
    'model', p_template.model_id,
    'params', p_template.params,
    'created_at', p_template.created_at
  )
$$;

-- Raises: PT400 invalid_input, PT401 not_authenticated, PT404 not_found.
create function private.save_prompt_template(
  p_title text, p_prompt text, p_model text, p_params jsonb, p_id uuid
) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
  v_params jsonb := private.read_request(array[p_prompt], p_params, null);
  v_template public.prompt_templates;
begin
  perform private.check_template(p_title, p_prompt, p_model);
  if p_id is not null then
    update public.prompt_templates
    set title = p_title, prompt = p_prompt, model_id = p_model, params = v_params
    where id = p_id and user_id = v_user_id
    returning * into v_template;
    if not found then
      perform private.refuse_unknown_template();
    end if;
  else
    perform private.check_template_count(v_user_id);
    insert into public.prompt_templates (user_id, title, prompt, model_id, params)
    values (v_user_id, p_title, p_prompt, p_model, v_params)
    returning * into v_template;
  end if;
  return private.template_json(v_template);
end;
$$;

-- Raises PT400 invalid_input.
create function private.check_template(p_title text, p_prompt text, p_model text) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if private.is_blank(p_prompt) then
    perform private.refuse_input('prompt: empty');
  elsif octet_length(p_title) > 400 or length(p_title) > 100 or private.is_blank(p_title) then
    perform private.refuse_input('title: not 1 to 100 characters');
  elsif octet_length(p_model) not between 1 and 100 then
    perform private.refuse_input('model: not 1 to 100 bytes');
  end if;
end;
$$;

-- Raises PT400 invalid_input. Not exact for one who saves many in the same moment; all that matters
-- is that there is an end.
create function private.check_template_count(p_user_id uuid) returns void
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
  if (select count(*) >= 100 from public.prompt_templates where user_id = p_user_id) then
    perform private.refuse_input('title: you have 100 templates', 'Delete one first.');
  end if;
end;
$$;

-- Raises PT404 not_found, also for templates of others and of the app.
create function private.refuse_unknown_template() returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  perform private.refuse_missing(
    'id: no such template of yours',
    'list_prompt_templates() names them.'
  );
end;
$$;

-- Raises: PT401 not_authenticated, PT404 not_found.
create function private.delete_prompt_template(p_id uuid) returns json
language plpgsql security definer set search_path = pg_catalog, pg_temp as $$
declare
  v_user_id uuid := private.require_known_user_id(p_writes => true);
begin
  delete from public.prompt_templates where id = p_id and user_id = v_user_id;
  if not found then
    perform private.refuse_unknown_template();
  end if;
  return json_build_object('id', p_id);
end;
$$;

-- Raises: PT401 not_authenticated.
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
