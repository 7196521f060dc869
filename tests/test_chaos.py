"""tests/chaos: a short run with its seed. The long ones, and what they gave: RESULTS.md there."""

from __future__ import annotations

import os

from chaos.cells import CELLS_KILLED, CellWorld
from chaos.director import EVERYTHING, SCENARIOS, Director
from chaos.faults import KINDS, plan
from chaos.invariants import RULES
from chaos.world import World

SEED = int(os.environ.get("CHAOS_SEED") or 7)
JOBS, FAULTS = 60, 10


def test_whatever_breaks_nothing_is_lost_doubled_or_wrongly_charged():
    """About a minute: a stack of its own, real workers, every kind of fault."""
    with World(fsync=False) as world:
        world.shorten()

        outcome = Director(world, EVERYTHING, SEED).run(JOBS, FAULTS, workers=3)

    assert outcome.violations == {name: [] for name in outcome.violations}, f"seed {SEED}"
    assert set(outcome.violations) == {*RULES, "drain", "faults", "logs"}
    assert (outcome.jobs, outcome.faults) == (JOBS + 2 * (JOBS // 10), FAULTS)  # batches
    assert outcome.statuses["completed"] > JOBS / 3


def test_whatever_cell_is_away_and_whoever_moves_the_same_holds_and_no_other_cell_is_hurt():
    """About a minute: two cells, an entry and workers of both."""
    with CellWorld(fsync=False) as world:
        world.shorten()

        outcome = Director(world, CELLS_KILLED, SEED).run(JOBS, 2 * FAULTS, workers=4)

    assert outcome.violations == {name: [] for name in outcome.violations}, f"seed {SEED}"
    assert outcome.violations.keys() >= {"hurt by another", "lives elsewhere", *RULES}
    assert outcome.done["moves moved"] > FAULTS / 2
    assert outcome.statuses["completed"] > JOBS / 3


def test_a_seed_gives_the_same_faults_again():
    assert plan(3, EVERYTHING.kinds, 40) == plan(3, EVERYTHING.kinds, 40)
    assert plan(4, EVERYTHING.kinds, 40) != plan(3, EVERYTHING.kinds, 40)
    assert {fault.kind for fault in plan(3, EVERYTHING.kinds, 40)} == set(EVERYTHING.kinds)
    scenarios = [*SCENARIOS, CELLS_KILLED]
    assert {kind for scenario in scenarios for kind in scenario.kinds} == set(KINDS)
