-- For a cell that is not home: what home sends is home's to say, and comes by replication alone. A row
-- that a migration or the seed would enter here as at home would stop the replication. Variable of psql:
-- tables, those that home publishes.

set local session_replication_role = replica;
select set_config('cells.tables', :'tables', true);

create function cells.leave_to_home() returns trigger language plpgsql as $$
begin
  return null;
end;
$$;

do $$
declare
  v_table regclass;
begin
  foreach v_table in array string_to_array(current_setting('cells.tables'), ',')::regclass[] loop
    continue when v_table = 'public.prompt_templates'::regclass;  -- users have some of their own
    execute format(
      'create trigger darkroom_leave_to_home before insert on %s'
      ' for each row execute function cells.leave_to_home()', v_table
    );
    if not exists (select from pg_subscription_rel as r where r.srrelid = v_table) then
      execute format('delete from %s', v_table);
    end if;
  end loop;
end;
$$;

set local session_replication_role = origin;
