-- The directory of cells, which every database of the system has: home keeps it, all others are sent
-- it (logical replication). A user is in home unless a row says otherwise, so an app that begins
-- with one database needs no row for anybody it has.

create schema cells;

create table cells.cells (
  name text primary key,
  address text not null,
  weight real not null default 1,
  constraint cells_weight_is_not_negative check (weight >= 0)
);

comment on table cells.cells is 'Every cell, home among them.';
comment on column cells.cells.address is
  'How the entry and home connect: a libpq string for role darkroom_entry, with its password.';
comment on column cells.cells.weight is
  'The share of new users, beside the others'' weights; 0: takes none.';

create table cells.users (
  user_id uuid primary key,
  cell text not null
);

comment on table cells.users is 'Who lives elsewhere than in home, or here no more.';
comment on column cells.users.cell is
  'moving: in none, for now. With a + before it: the cell has not been told of the user yet.';

create table cells.shared_paths (
  id uuid primary key default gen_random_uuid(),  -- that of another cell may come before one goes
  path text not null
);
create index shared_paths_path_idx on cells.shared_paths (path);

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
