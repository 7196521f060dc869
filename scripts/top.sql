-- What the queue does, in a terminal: `make top`, or
--   psql "$DATABASE_URL" -Xq -f scripts/top.sql
-- as darkroom_monitor or the owner. It draws public.queue_report(), again and again.
--
-- Variables: every, seconds between two looks; once, to look once; width, columns of the terminal;
-- fancy, whether it understands colours and may be cleared.
\if :{?every} \else \set every 5 \endif
\if :{?once} \else \set once false \endif
\if :{?width} \else \set width 120 \endif
\if :{?fancy} \else \set fancy true \endif
\pset format unaligned
\pset tuples_only on
\pset pager off
-- Control characters, and those that turn the direction of what follows.
\set unprintable '[\\u0001-\\u001f\\u007f-\\u009f\\u202a-\\u202e\\u2066-\\u2069]'

-- Each line is made of plain text, cut to the width and without control characters, which a
-- session's name might hold, and gets its colour as a whole.
with report as (
  select r.j, r.j -> 'health' as h, (r.j ->> 'at')::timestamptz as now
  from (select public.queue_report()::jsonb as j offset 0) as r  -- or it is called for each column
),

lines (place, nr, style, line) as (
  select 0, 0, case h ->> 'status' when 'ok' then 'good' else h ->> 'status' end,
    format('Darkroom  %s   %s   report took %s ms', upper(h ->> 'status'),
      to_char(now at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS"Z"'), j ->> 'took_ms')
  from report
  union all
  select 1, 10 * a.nr + l.nr, case l.nr when 0 then a.value ->> 'severity' else 'dim' end, l.line
  from report
  cross join jsonb_array_elements(h -> 'alerts') with ordinality as a (value, nr)
  cross join lateral (values
    (0, format('! %-17s %s', a.value ->> 'alert', a.value ->> 'detail')),
    (1, format('  %-17s %s', '', a.value ->> 'hint'))
  ) as l (nr, line)
  union all
  select 2, l.nr, 'plain', l.line
  from report
  cross join lateral (select h -> 'depth' as d, h -> 'running' as r, h -> 'workers' as w,
    h #> '{rates,per_minute_of_15}' as m, h #> '{rates,last_minute}' as l) as of
  cross join lateral (values
    (0, ''),
    (1, format('queue     %s ready, %s delayed, %s paused%s · %s running, %s of them past lease or deadline',
      d ->> 'ready', d ->> 'delayed', d ->> 'paused',
      ', the oldest waits ' || round((d ->> 'oldest_ready_seconds')::numeric) || ' s', r ->> 'jobs',
      r ->> 'stale')),
    (2, format('a minute  %s enqueued, %s completed, %s failed, %s retried · of 15 minutes, %s %% errors',
      m ->> 'enqueued', m ->> 'completed', m ->> 'failed', m ->> 'retried',
      coalesce(round(100 * (h #>> '{rates,error_rate}')::numeric, 1)::text, '-'))),
    (3, format('the last  %s enqueued, %s completed, %s failed, %s retried',
      l ->> 'enqueued', l ->> 'completed', l ->> 'failed', l ->> 'retried')),
    (4, format('workers   %s alive, %s of %s slots used, %s asleep, %s find jobs by polling only',
      w ->> 'alive', w ->> 'slots_used', w ->> 'slots', w ->> 'asleep',
      (w ->> 'alive')::integer - (w ->> 'listening')::integer)),
    (5, 'cron      ' || coalesce((
      select string_agg(format('%s %s ago', c.key,
        date_trunc('second', now - (c.value ->> 'last_run_at')::timestamptz)), ' · ' order by c.key)
      from jsonb_each(h -> 'routines') as c), 'nothing is scheduled')),
    (6, format('outbox    %s pending, %s dead · books %s problems', h #>> '{outbox,pending}',
      h #>> '{outbox,dead}', (h #>> '{books,recent_problems}')::integer
        + coalesce((h #>> '{books,problems}')::integer, 0)))
  ) as l (nr, line)
  union all
  select 3, v.nr::integer, 'warning',
    format('vacuum    held back by %s %s %s, %s for %s, %s transactions', v.value ->> 'kind',
      v.value ->> 'pid', quote_ident(v.value ->> 'name'), v.value ->> 'state',
      (v.value ->> 'seconds')::numeric * interval '1 second', v.value ->> 'transactions')
  from report
  cross join jsonb_array_elements(j -> 'vacuum_holders') with ordinality as v (value, nr)
  where (v.value ->> 'seconds')::numeric >= 60
    or (v.value ->> 'kind' <> 'session' and (v.value ->> 'transactions')::integer > 1000)
  union all
  select 10, 0, 'title', format('%-34s %7s %7s %6s %7s %8s %7s %7s %7s %6s', 'MODEL',
    'READY', 'DELAYED', 'PAUSED', 'RUNNING', 'OLDEST', 'P50', 'P95', 'DONE/H', 'ERRORS')
  union all
  select 10, m.nr::integer, case when (m.value ->> 'paused')::integer > 0 then 'warning' else 'plain' end,
    format('%-34s %7s %7s %6s %7s %8s %7s %7s %7s %6s', left(m.value ->> 'model_id', 34),
      m.value ->> 'ready', m.value ->> 'delayed', m.value ->> 'paused', m.value ->> 'running',
      coalesce(round((m.value ->> 'oldest_ready_seconds')::numeric) || ' s', '-'),
      coalesce(round((m.value ->> 'p50_seconds')::numeric, 1) || ' s', '-'),
      coalesce(round((m.value ->> 'p95_seconds')::numeric, 1) || ' s', '-'),
      m.value ->> 'completed', coalesce(round(100 * e.errors / nullif(e.errors
        + (m.value ->> 'completed')::numeric, 0), 1) || ' %', '-'))
  from report
  cross join jsonb_array_elements(j -> 'models') with ordinality as m (value, nr)
  cross join lateral (
    select (m.value ->> 'failed')::numeric + (m.value ->> 'retried')::numeric as errors
  ) as e
  where m.nr <= 10
  union all
  select 20, 0, 'title', format('%-6s %-28s %-8s %-8s %-10s %9s %9s', 'WORKER', 'HOST',
    'VERSION', 'STATE', 'WAKES BY', 'SLOTS', 'SEEN')
  union all
  select 20, w.nr::integer,
    case when w.value ->> 'state' = 'silent' then 'critical'
      when w.value ->> 'is_listening' = 'false' then 'warning' else 'plain' end,
    format('%-6s %-28s %-8s %-8s %-10s %9s %9s', w.value ->> 'worker_id',
      left(w.value ->> 'host', 28), left(w.value ->> 'version', 8), w.value ->> 'state',
      case w.value ->> 'is_listening' when 'true' then 'notify' else 'polling' end,
      concat(w.value ->> 'slots_used', '/', w.value ->> 'slots'),
      round((w.value ->> 'seen_seconds')::numeric) || ' s ago')
  from report
  cross join jsonb_array_elements(j -> 'workers') with ordinality as w (value, nr)
  where w.nr <= 10
  union all
  select 30, 0, 'title', 'ERRORS OF THE LAST HOUR'
  union all
  select 30, e.nr::integer, 'plain',
    format('%5s × %-20s %-34s %5s failed, last at %s', e.value ->> 'errors', e.value ->> 'error_code',
      left(e.value ->> 'model_id', 34), e.value ->> 'failed',
      to_char((e.value ->> 'last_at')::timestamptz at time zone 'utc', 'HH24:MI:SS'))
  from report
  cross join jsonb_array_elements(j -> 'errors') with ordinality as e (value, nr)
  where e.nr <= 8
  union all
  select 40, 0, 'title', format('%-8s %-34s %-10s %7s %8s %7s', 'ENDED', 'MODEL', 'OUTCOME',
    'ATTEMPT', 'WAITED', 'RAN')
  union all
  select 40, r.nr::integer, case when r.value ->> 'error_code' is null then 'plain' else 'warning' end,
    format('%-8s %-34s %-10s %7s %8s %7s  %s',
      to_char((r.value ->> 'ended_at')::timestamptz at time zone 'utc', 'HH24:MI:SS'),
      left(r.value ->> 'model_id', 34), r.value ->> 'outcome',
      r.value ->> 'attempt', r.value ->> 'waited_seconds' || ' s',
      r.value ->> 'ran_seconds' || ' s', r.value ->> 'error_code')
  from report
  cross join jsonb_array_elements(j -> 'recent') with ordinality as r (value, nr)
  where r.nr <= 8
)

select concat(
  case when l.first and :'fancy' = 'true' then e'\x1b[H\x1b[2J' end,
  case when :'fancy' = 'true' then s.code end,
  case when l.style = 'title' then e'\n' end,
  left(regexp_replace(l.line, :'unprintable', '·', 'g'), :width),
  case when :'fancy' = 'true' and s.code <> '' then e'\x1b[0m' end
)
from (select *, row_number() over (order by place, nr) = 1 as first from lines) as l
inner join (values
  ('plain', ''), ('good', e'\x1b[1;32m'), ('warning', e'\x1b[33m'), ('critical', e'\x1b[1;31m'),
  ('dim', e'\x1b[2m'), ('title', e'\x1b[1m')
) as s (style, code) on s.style = l.style
order by l.place, l.nr
\if :once
\g
\else
\watch :every
\endif
