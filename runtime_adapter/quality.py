"""What a codec costs a model's answers, measured on that model and the user's own tokens.

The first tokens are prefilled and saved once with each codec. Restored from there, the model is
asked for the next ones: those of the text (teacher forcing), and those that it generated itself
behind the exact cache. Each answer is compared with the exact cache's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import kvstore
from kvstore.errors import CapacityError, InputError, TokensError
from runtime_adapter.model import Model

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Logits: TypeAlias = npt.NDArray[np.float64]

CANDIDATES = ("exact", "half", "int8", "int8-channel", "k=int8,v=int4", "int4", "pca")
"""What is measured by default."""

_CALIBRATION_N_TOKENS = 2048
"""More is hardly better, and takes long to compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftBound:
    """How far answers may drift to be called that."""

    mean_kl: float
    top1: float


BOUNDS = {
    "exact": DriftBound(mean_kl=0.0, top1=1.0),
    "strict": DriftBound(mean_kl=1e-5, top1=0.999),
    "close": DriftBound(mean_kl=1e-3, top1=0.99),
    "loose": DriftBound(mean_kl=1e-2, top1=0.97),
}
"""Named bounds: mean KL divergence in nats, and how often the likeliest token is the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How a restored cache's answers differ from the exact one's.

    Over ``n_scored_tokens`` of the text: perplexity there and with the exact cache, KL divergence
    in nats, differences of logits, and ``top1``, the part where the likeliest token is the same.
    ``generated_top1`` is that over ``n_generated_tokens`` that the model generated itself.
    """

    n_scored_tokens: int
    perplexity: float
    exact_perplexity: float
    mean_kl: float
    max_kl: float
    mean_logit_error: float
    max_logit_error: float
    top1: float
    n_generated_tokens: int
    generated_top1: float

    @property
    def perplexity_change(self) -> float:
        """As a part of the exact cache's."""
        return self.perplexity / self.exact_perplexity - 1

    def is_within(self, bound: DriftBound) -> bool:
        """Whether the answers drift no further."""
        return self.mean_kl <= bound.mean_kl and min(self.top1, self.generated_top1) >= bound.top1


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecMeasure:
    """One codec on one model: size, seconds, and what it does to the answers.

    ``stored_as`` is what ``codec`` came down to for this model's tensors; ``n_fallback_blobs`` were
    stored exactly although it is lossy. ``restore_s`` is the faster of two loads. What the codec
    learned takes ``bases_nbytes`` beside ``stored_nbytes``, once for a model, and was learned from
    ``n_calibration_tokens`` of another text, or from the stored ones themselves if that is 0 (also
    if only for some tensors, as when the other text was too short).
    """

    codec: str
    stored_as: str
    n_tokens: int
    n_fallback_blobs: int
    raw_nbytes: int
    stored_nbytes: int
    save_s: float
    restore_s: float
    drift: Drift
    bases_nbytes: int = 0
    n_calibration_tokens: int = 0

    @property
    def is_in_sample(self) -> bool:
        """Whether what is stored is also what the codec learned from: it then looks too good."""
        return self.bases_nbytes > 0 and not self.n_calibration_tokens


def measure_codecs(  # all of them are the question
    model: Model,
    ids: Sequence[int],
    codecs: Sequence[str],
    folder: Path,
    *,
    n_scored: int = 256,
    n_generated: int = 256,
    calibration: Sequence[int] = (),
) -> list[CodecMeasure]:
    """Each codec on ``model``; all of ``ids`` but the last ``n_scored + 1`` are stored.

    ``calibration``: ids of another text, from which codecs that have to learn do so first.
    ``split`` cuts it off a text.

    The cache's content is given up. ``folder`` holds a file for each codec, whose chunks divide the
    number of tokens, so that no tail is exact. Takes ``len(codecs)`` times the time to compute
    ``n_scored + n_generated`` tokens one by one, and memory for as many logits.

    Raises:
        TokensError: too few ids.
        CapacityError: the cache has no room for as many.
        InputError: a codec that is none.
        KVStoreError: whatever the model or the store raises.
    """
    if not codecs:
        raise InputError("measure_codecs: expected names of codecs, found none")
    for name in codecs:
        kvstore.CodecChoice(name)
    n_stored, chunk_n_tokens = _stored_n_tokens(model, ids, n_scored, n_generated)
    text = list(ids[n_stored : n_stored + n_scored + 1])
    paths = {
        name: folder / f"{number}.db"
        for number, name in enumerate(dict.fromkeys(("exact", *codecs)))
    }
    learning = {name for name in paths if kvstore.CodecChoice(name).needs_basis(model.cache.layout)}
    learned = {}
    if learning and calibration:
        model.cache.truncate(0)
        model.forward(calibration, start=0)
        for name in learning:
            with kvstore.open(paths[name], codec=name, chunk_n_tokens=chunk_n_tokens) as store:
                store.save_session(model.cache, calibration)
                learned[name] = store.stats().bases_nbytes
    model.cache.truncate(0)
    model.forward(ids[:n_stored], start=0)
    saves = {}
    for name, path in paths.items():
        with kvstore.open(path, codec=name, chunk_n_tokens=chunk_n_tokens) as store:
            saved = store.save_session(model.cache, ids[:n_stored])
            saves[name] = (path, saved, store.stats().bases_nbytes)

    def answers(name: str, following: Sequence[int]) -> tuple[Logits, float]:
        path = saves[name][0]
        with kvstore.open(path, codec=name, chunk_n_tokens=chunk_n_tokens) as store:
            seconds = _restore(model, store, ids[: n_stored + 1])
        return _answers(model, following, start=n_stored), seconds

    exact_text, _ = answers("exact", text[:-1])
    model.cache.truncate(0)
    with kvstore.open(saves["exact"][0], chunk_n_tokens=chunk_n_tokens) as store:
        _restore(model, store, ids[: n_stored + 1])
    generated, exact_generated = _generate(model, text[0], n_generated, start=n_stored)
    measures = []
    for name in codecs:
        of_text, first_s = answers(name, text[:-1])
        of_generated, second_s = answers(name, generated[:-1])
        _, saved, bases_nbytes = saves[name]
        # A basis more, and some of it came from what is measured.
        is_calibrated = learned.get(name) == bases_nbytes > 0
        measures.append(
            CodecMeasure(
                codec=name,
                stored_as=saved.codec,
                n_tokens=n_stored,
                n_fallback_blobs=saved.n_fallback_blobs,
                raw_nbytes=saved.raw_nbytes,
                stored_nbytes=saved.stored_nbytes,
                save_s=saved.seconds,
                restore_s=min(first_s, second_s),
                drift=_drift(of_text, exact_text, text[1:], of_generated, exact_generated),
                bases_nbytes=bases_nbytes,
                n_calibration_tokens=len(calibration) if is_calibrated else 0,
            )
        )
    return measures


def split(ids: list[int], *, n_scored: int = 256) -> tuple[list[int], list[int]]:
    """``ids`` to store and score, and behind them those to calibrate with: none of a short text.

    Both parts are long enough to learn from, so that the one says something of the other.
    """
    n_calibration = min(
        _CALIBRATION_N_TOKENS, len(ids) - kvstore.MIN_TRAINING_N_TOKENS - n_scored - 1
    )
    if n_calibration < kvstore.MIN_TRAINING_N_TOKENS:
        return ids, []
    return ids[: len(ids) - n_calibration], ids[len(ids) - n_calibration :]


def cheapest(measures: Sequence[CodecMeasure], bound: str) -> CodecMeasure:
    """The one that takes fewest bytes of those whose drift is within the named bound.

    With what it learned: a short text may not pay for that.

    Raises:
        InputError: no bound has that name, or none of them is within it.
    """
    if bound not in BOUNDS:
        raise InputError(f"bound: expected one of {', '.join(BOUNDS)}, found {bound!r:.80}")
    within = [one for one in measures if one.drift.is_within(BOUNDS[bound])]
    if not within:
        raise InputError(
            f"bound {bound!r}: none of {', '.join(one.codec for one in measures)} is within it; "
            "measure 'exact' too"
        )
    return min(within, key=lambda one: one.stored_nbytes + one.bases_nbytes)


def _stored_n_tokens(
    model: Model, ids: Sequence[int], n_scored: int, n_generated: int
) -> tuple[int, int]:
    """How many ids to store, and a chunk size that divides their number."""
    if n_scored < 1 or n_generated < 1:
        raise InputError(
            f"expected at least 1 scored and 1 generated token, found {n_scored}, {n_generated}"
        )
    n_stored = len(ids) - n_scored - 1
    chunk_n_tokens = min(256, n_stored)
    if n_stored < 1:
        raise TokensError(
            f"expected more than {n_scored + 1} token ids ({n_scored} of them to score), found "
            f"{len(ids)}; give more, or score fewer"
        )
    n_stored -= n_stored % chunk_n_tokens
    needed = n_stored + max(n_scored, n_generated) + 1
    if needed > model.capacity_n_tokens:
        raise CapacityError(
            f"expected room for {needed} tokens in the model's cache, found "
            f"{model.capacity_n_tokens}; give fewer ids, or score and generate fewer"
        )
    return n_stored, chunk_n_tokens


def _restore(model: Model, store: kvstore.Store, ids: Sequence[int]) -> float:
    """Put all but the last of ``ids`` back; returns the seconds that the load took."""
    model.cache.truncate(0)
    hit = store.load_session(model.cache, ids)
    if hit.n_tokens < len(ids) - 1:
        raise InputError(f"restored {hit.n_tokens} of {len(ids) - 1} tokens: {hit.detail}")
    return hit.seconds


def _answers(model: Model, ids: Sequence[int], *, start: int) -> Logits:
    """The logits behind each of ``ids``, ``[n, vocab]``."""
    import numpy as np

    logits = [
        model.forward([token], start=start + number).numpy() for number, token in enumerate(ids)
    ]
    return np.stack(logits).astype(np.float64)


def _generate(model: Model, first: int, n_tokens: int, *, start: int) -> tuple[list[int], Logits]:
    """``first`` and the ``n_tokens`` generated behind it, and the logits that they came from."""
    import numpy as np

    ids = [first]
    logits: list[npt.NDArray[np.float32]] = []
    while len(logits) < n_tokens:
        logits.append(model.forward(ids[-1:], start=start + len(ids) - 1).numpy())
        ids.append(int(logits[-1].argmax()))
    return ids, np.stack(logits).astype(np.float64)


def _drift(
    text: Logits, exact: Logits, ids: Sequence[int], generated: Logits, exact_generated: Logits
) -> Drift:
    import numpy as np

    ours, theirs = _log_softmax(text), _log_softmax(exact)
    kl = (np.exp(theirs) * (theirs - ours)).sum(axis=1).clip(min=0)
    chosen = (np.arange(len(ids)), np.asarray(ids))
    error = np.abs(text - exact)
    return Drift(
        n_scored_tokens=len(ids),
        perplexity=float(np.exp(-ours[chosen].mean())),
        exact_perplexity=float(np.exp(-theirs[chosen].mean())),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        mean_logit_error=float(error.mean()),
        max_logit_error=float(error.max()),
        top1=_agreement(text, exact),
        n_generated_tokens=len(generated),
        generated_top1=_agreement(generated, exact_generated),
    )


def _agreement(logits: Logits, exact: Logits) -> float:
    return float((logits.argmax(axis=1) == exact.argmax(axis=1)).mean())


def _log_softmax(logits: Logits) -> Any:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
