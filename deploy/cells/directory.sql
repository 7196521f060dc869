-- The directory of cells, which every database of the system has: home keeps it, all others are sent
-- it (logical replication). A user is in home unless a row says otherwise, so an app that begins
-- with one database needs no row for anybody it has.
--
-- It is the first file everywhere, and all files are run again after a release (deploy/cells/cells): code
-- is made anew, rows stay.

create schema if not exists cells;

do $$
declare
  v_drop text;
begin
  for v_drop in
    select format('drop routine if exists %s cascade', p.oid::regprocedure)
    from pg_proc as p
    where p.pronamespace = 'cells'::regnamespace and not exists (
      select from pg_depend as d where d.objid = p.oid and d.deptype = 'e'
    )
    union all
    select format('drop view if exists %s', c.oid::regclass) from pg_class as c
    where c.relnamespace = 'cells'::regnamespace and c.relkind = 'v'
  loop
    execute v_drop;
  end loop;
end;
$$;

create table if not exists cells.cells (
  name text primary key,
  address text not null,
  pooler text,
  weight real not null default 1,
  constraint cells_weight_is_not_negative check (weight >= 0)
);

comment on table cells.cells is 'Every cell, home among them.';
comment on column cells.cells.address is
  'How the entry and home connect: a libpq string for role darkroom_entry, with its password.';
comment on column cells.cells.pooler is
  'Where calls of the API go instead: PgBouncer in transaction mode. The rest needs a session.';
comment on column cells.cells.weight is
  'The share of new users, beside the others'' weights; 0: takes none.';

create table if not exists cells.users (
  user_id uuid primary key,
  cell text not null
);

comment on table cells.users is 'Who lives elsewhere than in home, or here no more.';
comment on column cells.users.cell is
  'moving: in none, for now. With a + before it: the cell has not been told of the user yet.';

create table if not exists cells.shared_paths (
  id uuid primary key default gen_random_uuid(),  -- that of another cell may come before one goes
  path text not null
);
create index if not exists shared_paths_path_idx on cells.shared_paths (path);

comment on table cells.shared_paths is
  'Files of shared images, of users who do not live in home: home is sent them.';

revoke all on schema cells from public;

-- How a cell is reached: by the entry, by home, and home's list of files by the cells.
do $$
begin
  if to_regrole('darkroom_entry') is null then
    create role darkroom_entry login noinherit;
  end if;
end;
$$;
alter role darkroom_entry set statement_timeout = '8s';
grant usage on schema cells to darkroom_entry;

-- How databases reach each other. Secrets come as the setting cells.secret, so that no log has them.

create function cells.set_password(p_role text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  execute format('alter role %I password %L', p_role, current_setting('cells.secret'));
end;
$$;

-- The publication that a subscription of this name is of: the name is the publication's, and whose the
-- subscription is.
create function cells.publication_of(p_name text) returns text
language sql immutable set search_path = pg_catalog, pg_temp
return substring(p_name, '^darkroom_[a-z]+');

-- Lets a subscription read what is published, as a role of its name.
create function cells.let_read(p_name text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  if to_regrole(p_name) is null then
    execute format('create role %I login noinherit replication bypassrls', p_name);
  end if;
  perform cells.set_password(p_name);
  execute (
    select string_agg(format(
      'grant usage on schema %I to %I; grant select on %1$I.%3$I to %2$I',
      t.schemaname, p_name, t.tablename
    ), ';')
    from pg_publication_tables as t where t.pubname = cells.publication_of(p_name)
  );
end;
$$;

-- Not connecting, or it could not be done in a function; of that it warns in the log, with the statement,
-- so that is not the one with the secret.
create function cells.subscribe(p_name text) returns void
language plpgsql set search_path = pg_catalog, pg_temp set client_min_messages = error as $$
begin
  if not exists (
    select from pg_subscription as s
    inner join pg_database as d on d.oid = s.subdbid and d.datname = current_database()
    where s.subname = p_name
  ) then
    execute format(
      'create subscription %I connection ''password=none'' publication %I with (connect = false)',
      p_name, cells.publication_of(p_name)
    );
  end if;
  execute format('alter subscription %I connection %L', p_name, current_setting('cells.secret'));
end;
$$;

-- Empties what a subscription fills, to be filled anew; of what many cells send to home, what is of the
-- users of this one.
create function cells.forget(p_name text) returns void
language plpgsql set search_path = pg_catalog, pg_temp
set session_replication_role = replica as $$
declare
  v_table regclass;
  v_cell text := substring(p_name, '^darkroom_files_(.*)');
begin
  for v_table in
    select r.srrelid from pg_subscription_rel as r
    inner join pg_subscription as s on s.oid = r.srsubid
    where s.subname = p_name
  loop
    execute format('delete from %s%s', v_table, case
      when v_cell is null then ''
      else format(
        ' where %s::text in (select user_id::text from cells.users where cell = %L)',
        case v_table when 'cells.shared_paths'::regclass then 'split_part(path, ''/'', 1)'
          else 'into_id' end,
        v_cell
      )
    end);
  end loop;
end;
$$;

-- A server for foreign tables, at an address of the directory; anew only if that is another.
create function cells.make_server(p_name text, p_address text, p_options text default '')
returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
  v_is text := md5(p_address || p_options);
begin
  if v_is = (
    select obj_description(s.oid) from pg_foreign_server as s where s.srvname = p_name
  ) then
    return;
  end if;
  execute format('drop server if exists %I cascade', p_name);
  execute (
    select format(
      'create server %I foreign data wrapper postgres_fdw options (%s, options %L);'
      'create user mapping for public server %1$I options (user ''darkroom_entry'', password %4$L);'
      'comment on server %1$I is %5$L', p_name,
      string_agg(format('%s %L', o.name, o.value), ', ') filter (
        where o.name not in ('user', 'password')
      ),
      p_options, max(o.value) filter (where o.name = 'password'), v_is
    )
    from regexp_split_to_table(p_address, ' +') as part
    cross join lateral (select split_part(part, '=', 1), split_part(part, '=', 2)) as o (name, value)
  );
end;
$$;
