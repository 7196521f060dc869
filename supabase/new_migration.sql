-- Say what changes, and why.
--
-- `sql/` is the truth: change it first. Here stands what brings a database at work to it, and
-- tests/test_migrations.py holds both to each other. Workers of the release before go on meanwhile,
-- and what waits too long for a lock gives up: see Upgrading in docs/RUNBOOK.md. The grants of
-- sql/92_rights.sql for what is new belong here, too. Once released, this file never changes again.

select set_config('lock_timeout', '5s', true);
