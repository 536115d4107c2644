"""Which kind of state a persistent tensor is: one module a kind, registered here.

A classifier looks at the instructions that update the tensor, never at names. A
new kind is one more module, one line below, and its tests (and its arithmetic
in ``kvstore.kinds``).
"""

from runtime_adapter.state.classifiers.base import Classifier, Evidence, Verdict
from runtime_adapter.state.classifiers.checkpoint import classify_checkpoint
from runtime_adapter.state.classifiers.full import classify_full
from runtime_adapter.state.classifiers.positions import classify_positions
from runtime_adapter.state.classifiers.window import classify_window

CLASSIFIERS: tuple[Classifier, ...] = (
    classify_positions,
    classify_window,
    classify_full,
    classify_checkpoint,
)
"""Asked in this order; the first answer counts."""


def classify(evidence: Evidence, value: int) -> Verdict | None:
    """The first verdict on ``value``; None for what no classifier knows."""
    for classifier in CLASSIFIERS:
        verdict = classifier(evidence, value)
        if verdict is not None:
            return verdict
    return None


__all__ = ["CLASSIFIERS", "Classifier", "Evidence", "Verdict", "classify"]
