-- Home, after home.sql: how many jobs all cells together may run at a provider (max_running), and
-- what they may spend (budgets).
--
-- Each cell has a part of each limit, and all parts together are never more than the limit. Home
-- divides them anew each minute, by what each cell has and wants; a tenth goes in equal parts, for
-- who wants something in between. What one cell gives up goes to another once it keeps to that. So
-- a cell that is away keeps its part.

create table if not exists cells.parts (
  cell text references cells.cells (name) on delete cascade,
  name text,
  part numeric not null,
  wanted numeric,
  primary key (name, cell)
);

comment on table cells.parts is
  'The most that each cell may have of each limit: what it said last, or more that it was sent.';
comment on column cells.parts.wanted is 'Null: the cell is away.';

-- The parts that a cell may have now. What cells that are away leave of each limit is cut into
-- pieces of whole units for the others, one after the other; luck moves the cuts, so that what has
-- fewer units than there are cells goes round.
create function cells.next_parts(p_cell text, p_luck double precision) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(d.name, greatest(least(d.upto - d.before, d.free), 0)), '{}')
  from (
    select
      s.*, s.whole - sum(s.part) over (partition by s.name) + s.part as free,
      lag(s.upto, 1, 0::numeric) over (partition by s.name order by s.cell) as before
    from (
      select l.*, l.unit * floor(
        (l.whole - sum(case when not l.is_there then l.part else 0 end) over each) / l.unit
        * sum(l.weight) over (each order by l.cell) / nullif(sum(l.weight) over each, 0)
        + p_luck::numeric
      ) as upto
      from (
        select
          c.name as cell, w.name, w.whole, w.unit, p.wanted is not null as is_there,
          coalesce(p.part, case c.name when 'home' then w.whole else 0 end) as part,
          coalesce(p.wanted + w.whole / 10 / count(*) over (partition by w.name), 0) as weight
        from cells.limits as w cross join cells.cells as c
        left join cells.parts as p on p.name = w.name and p.cell = c.name
      ) as l
      window each as (partition by l.name)
    ) as s
  ) as d
  where d.cell = p_cell and d.is_there
$$;

-- First each cell says what it has and wants. Then it is sent its parts: twice, as what one gives up
-- another may have. What it may have is on record, committed, before it is sent.
create procedure cells.share_limits()
language plpgsql as $$
declare
  v record;
  v_luck double precision := random();
  v_parts jsonb;
begin
  perform pg_advisory_lock(hashtextextended('cells.share_limits', 0));
  for v in
    select c.name, c.address, r.round
    from cells.cells as c cross join generate_series(1, 3) as r (round) order by r.round, c.name
  loop
    v_parts := case when v.round > 1 then cells.next_parts(v.name, v_luck) else '{}' end;
    continue when v.round > 1 and v_parts = '{}';
    update cells.parts as p set part = greatest(p.part, (v_parts ->> p.name)::numeric)
    where p.cell = v.name;
    commit;
    begin
      insert into cells.parts as p (cell, name, part, wanted)
      select v.name, a.* from cells.dblink(
        v.address, format('select * from cells.take_parts(%L)', v_parts)
      ) as a (name text, part numeric, wanted numeric)
      on conflict (name, cell) do update set part = excluded.part, wanted = excluded.wanted;
    exception when others then
      raise warning 'cell % keeps its parts: % %', v.name, sqlstate, sqlerrm;
      update cells.parts set wanted = null where cell = v.name;
    end;
    commit;
  end loop;
  perform pg_advisory_unlock(hashtextextended('cells.share_limits', 0));
end;
$$;

do $$
begin
  perform cron.schedule('darkroom_share_limits', '* * * * *', 'call cells.share_limits()');
exception when invalid_schema_name then
  raise notice 'Darkroom: no pg_cron for this database; call cells.share_limits() each minute';
end;
$$;
