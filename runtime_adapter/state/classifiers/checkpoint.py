"""Everything else: rewritten as a whole, so good at exactly the length it was computed for.

Recurrent and convolution states are of this kind, and so is any tensor whose
slots cannot be followed: what it holds after ``n`` tokens can always be kept and
put back whole.
"""

from __future__ import annotations

from kvstore import Kind
from runtime_adapter.state.classifiers.base import Evidence, Verdict

UNKNOWN_SLOTS = "where it is written cannot be followed: it is kept whole, at exact lengths only"
IN_DELEGATE = "a delegate writes it: where a token goes cannot be seen, so it is kept whole"


def classify_checkpoint(evidence: Evidence, value: int) -> Verdict | None:
    """Any tensor that the method changes."""
    if not evidence.flow.updates.get(value):
        return None
    return Verdict(
        kind=Kind.CHECKPOINT,
        note=_note(evidence, value),
        position=evidence.update_position(value),
    )


def _note(evidence: Evidence, value: int) -> str | None:
    if _looks_cut(evidence, value):
        return UNKNOWN_SLOTS
    flow = evidence.flow
    sources = {
        flow.resolve(source)
        for step in flow.updates[value]
        for source in step.reads
        if source in flow.graph.tensors
    }
    made = [flow.producer[source] for source in sources if source in flow.producer]
    return IN_DELEGATE if any(step.delegate is not None for step in made) else None


def _looks_cut(evidence: Evidence, value: int) -> bool:
    """Whether slots of it are written at a place that changes from call to call."""
    writes = evidence.writes(value) or ()
    graph = evidence.flow.graph
    return any(
        write.slot in graph.tensors or evidence.flow.depends_on(write.slot)[0] for write in writes
    )
