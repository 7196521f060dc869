"""The parts of the bench, in the order in which they run."""

from core import Part

from parts import batch, drain, enqueue, latency

PARTS: dict[str, Part] = {
    part.name: part for part in (enqueue.PART, batch.PART, drain.PART, latency.PART)
}
