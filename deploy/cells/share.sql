-- Home, after home.sql: what all cells may run at a provider (max_running) and spend (budgets) together.
--
-- Each cell has a part of each limit, and claims by that; what all parts make together is never more
-- than the limit. Each minute home divides them anew, by what each cell has and wants, but for a tenth
-- that is divided equally. A part that is taken away is given to another only when the cell has said
-- that it keeps to it; so a cell that is away keeps its part.

create table if not exists cells.parts (
  cell text references cells.cells (name) on delete cascade,
  name text,
  part numeric not null,
  wanted numeric not null,
  primary key (name, cell)
);

comment on table cells.parts is
  'What each cell may have of each limit, as it has said, or will have by what home has sent it since.';

-- The parts that a cell is to have now: it and the others in the order of their names cut each limit
-- into as many pieces, in whole units. Where such a cut falls is moved by luck, or what is too small to
-- be cut would be the same cell's for ever.
create function cells.next_parts(p_cell text, p_luck double precision) returns jsonb
language sql stable set search_path = pg_catalog, pg_temp as $$
  select coalesce(jsonb_object_agg(d.name, greatest(least(d.part_to - d.part_from, d.free), 0)), '{}')
  from (
    select
      l.cell, l.name, l.is_known, l.whole - sum(l.part) over each + l.part as free,
      l.unit * floor(l.whole / l.unit * sum(l.weight) over up_to_it / sum(l.weight) over each
        + p_luck::numeric) as part_to,
      l.unit * floor(l.whole / l.unit * (sum(l.weight) over up_to_it - l.weight)
        / sum(l.weight) over each + p_luck::numeric) as part_from
    from (
      select
        c.name as cell, w.name, w.whole, w.unit, p.part is not null as is_known,
        coalesce(p.part, case c.name when 'home' then w.whole else 0 end) as part,
        coalesce(p.wanted, w.unit) + w.whole / 10 / count(*) over (partition by w.name) as weight
      from cells.limits as w cross join cells.cells as c
      left join cells.parts as p on p.name = w.name and p.cell = c.name
    ) as l
    window each as (partition by l.name), up_to_it as (partition by l.name order by l.cell)
  ) as d
  where d.cell = p_cell and d.is_known
$$;

-- No rows where the cell does not answer.
create function cells.send_parts(p_cell text, p_parts jsonb)
returns table (name text, part numeric, wanted numeric)
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
  return query select a.* from cells.dblink(
    (select c.address from cells.cells as c where c.name = p_cell),
    format('select * from cells.take_parts(%L)', p_parts)
  ) as a (name text, part numeric, wanted numeric);
exception when others then
  raise log 'cell % keeps its parts: % %', p_cell, sqlstate, sqlerrm;
end;
$$;

-- First each cell says what it has and wants. Then twice, for what one gives back another may have.
-- What a cell may have is on record, committed, before the cell is told.
create procedure cells.share_limits()
language plpgsql as $$
declare
  v record;
  v_luck double precision := random();
  v_away text[] := '{}';
  v_parts jsonb;
begin
  perform pg_advisory_lock(hashtextextended('cells.share_limits', 0));
  for v in
    select c.name, r.round from cells.cells as c cross join generate_series(1, 3) as r (round)
    order by r.round, c.name
  loop
    continue when v.name = any (v_away);
    v_parts := case when v.round = 1 then '{}' else cells.next_parts(v.name, v_luck) end;
    update cells.parts as p set part = greatest(p.part, (v_parts ->> p.name)::numeric)
    where p.cell = v.name;
    commit;
    insert into cells.parts (cell, name, part, wanted)
    select v.name, s.* from cells.send_parts(v.name, v_parts) as s
    on conflict (name, cell) do update set part = excluded.part, wanted = excluded.wanted;
    if not found then
      v_away := v_away || v.name;
    end if;
    commit;
  end loop;
  perform pg_advisory_unlock(hashtextextended('cells.share_limits', 0));
end;
$$;

revoke all on function cells.next_parts, cells.send_parts from public;
revoke all on procedure cells.share_limits from public;

do $$
begin
  perform cron.schedule('darkroom_share_limits', '* * * * *', 'call cells.share_limits()');
exception when invalid_schema_name then
  raise notice 'Darkroom: no pg_cron for this database; call cells.share_limits() each minute yourself';
end;
$$;
