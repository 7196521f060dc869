"""The parts of the bench, in the order in which they run.

A part is a module with a PART (core.Part): its texts, the compared metric, the reference, and
make_tasks, which answers what to measure in every round. To add one, write it and list it here.
"""

from core import Part

from parts import batch, cells, drain, enqueue, growth, http, latency, status, worker

MODULES = (enqueue, batch, drain, latency, status, growth, http, worker, cells)
PARTS: dict[str, Part] = {module.PART.name: module.PART for module in MODULES}
