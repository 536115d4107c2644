"""Dropping tokens from the middle of a live cache: what follows moves up, its keys turned back.

Approximate by nature: keys and values behind the dropped range were computed with it in view.
Only the first layer's keys come out as if they had been computed at their new place.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore import Edit, Held, TensorSpec
from kvstore.errors import InputError, RewindError, UnsupportedStateError
from runtime_adapter.caches.live import LiveTensors
from runtime_adapter.model import Model
from runtime_adapter.session.keys import key_roles, layers_of, read_keys
from runtime_adapter.session.rope import LayerRope, RopeSpec, measure

if TYPE_CHECKING:
    import torch

_SAMPLE_N_POSITIONS = 128
_SAMPLE_N_TOKENS = 4
_SAMPLE_N_TOKENS_SLOWLY = 2  # where every position is a call of its own
# The largest difference allowed, as a part of the largest number, by the keys' dtype.
_TOLERANCES = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2, "int8": 4e-2}
# Rounding of the arithmetic itself, which does not grow with the distance.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRope:
    """The rotation of one layer, and how far keys may be moved by it."""

    rope: LayerRope
    reach_n_tokens: float


_checked: weakref.WeakKeyDictionary[
    LiveTensors, list[tuple[RopeSpec | None, dict[int, CheckedRope]]]
] = weakref.WeakKeyDictionary()
"""What was given (None: nothing) and checked, and what is used then, by model."""


def check_kinds(cache: LiveTensors) -> None:
    """Refuse a cache from whose middle nothing can be dropped.

    Raises:
        UnsupportedStateError: recurrent state, keys and values that cannot be told apart, or keys
            whose numbers cannot be read.
    """
    for spec in cache.layout.tensors:
        if spec.sink_n_tokens:
            raise UnsupportedStateError(
                f"strike: expected keys turned by their position, found {spec.name} behind an "
                "attention sink, whose keys are turned by their slot; such a cache makes room by "
                "itself"
            )
        if not spec.kind.rules.has_token_axis:
            raise UnsupportedStateError(
                f"strike: expected keys and values, found {spec.name} with recurrent state, which "
                "cannot forget a part; use replace(start, stop, []) instead"
            )
        if spec.role == "cache":
            raise UnsupportedStateError(
                f"strike: expected keys and values told apart, found {spec.name}, which may be "
                "either; use replace(start, stop, []) instead"
            )
    for layer in layers_of(cache).values():
        key_roles(layer)


def rope_of(
    model: Model, given: RopeSpec | None = None, *, distance: int = 1
) -> dict[int, LayerRope]:
    """The rotation of every layer's keys: ``given``, or measured; checked on the model.

    The model computes a few tokens, each repeated many times: attention over equal values is
    that value, so in every layer such keys differ by their rotation alone. What the cache
    held is put back. Done once a model, and once more for each other rotation that is given.

    Raises:
        InputError: ``given`` is no rotation of each layer, or not what the model computes.
        UnsupportedStateError: no rotation fits, or none is known well enough to move keys
            by ``distance`` positions.
    """
    checked = _checked.setdefault(model.cache, [])
    used = next((used for before, used in checked if before == given), None)
    if used is None:
        samples = _sample(model)
        if given is None:
            used = {number: _measured(model, number, samples) for number in samples}
        else:
            used = {number: _compared(model, number, samples, given) for number in samples}
        checked.append((None if given is None else dict(given), used))
    for number, layer in used.items():
        if distance > layer.reach_n_tokens:
            raise UnsupportedStateError(
                f"strike: the rotation of layer {number} could be measured well enough to move "
                f"keys by {layer.reach_n_tokens:.0f} positions, not by {distance}; give it as "
                "rope=, or use replace(start, stop, []) instead"
            )
    return {number: layer.rope for number, layer in used.items()}


Samples = Mapping[int, Sequence[Any]]
"""Per layer with keys, float32 ``[n, H_kv, D]`` for each of a few tokens: its keys at ``n``
positions in a row."""


def _measured(model: Model, number: int, samples: Samples) -> CheckedRope:
    """The rotation of one layer: its own, or one of a layer that could be seen from farther."""
    allowed = _TOLERANCES[model.cache.layer(number).k.spec.dtype]
    found: list[CheckedRope] = []
    errors = []
    for other in dict.fromkeys((number, *samples)):
        if len(samples[other][0]) < len(samples[number][0]):
            continue
        if samples[other][0].shape[-1] != samples[number][0].shape[-1]:
            continue
        rope = measure(samples[other])
        error = max(rope.error(rows) for rows in samples[number])
        errors.append(error)
        if error <= allowed:
            spread = max(max(rope.error(rows) for rows in samples[other]) - _ROUNDING, 1e-12)
            reach = len(samples[other][0]) * allowed / spread
            found.append(CheckedRope(rope=rope, reach_n_tokens=reach))
    if not found:
        raise UnsupportedStateError(
            f"strike: layer {number}: expected keys of equal tokens that differ by a rotation "
            f"alone, to {allowed:g} of the largest, found {min(errors):.3g}; this model places its "
            "tokens in another way: use replace(start, stop, []) instead"
        )
    return max(found, key=lambda layer: layer.reach_n_tokens)


def _compared(model: Model, number: int, samples: Samples, given: Any) -> CheckedRope:
    """The given rotation of one layer, if it is what the model computes."""
    if not isinstance(given, Mapping) or not isinstance(given.get(number), LayerRope):
        raise InputError(f"rope: expected a LayerRope for layer {number}, found none")
    rope, rows = given[number], samples[number]
    n_dims = rows[0].shape[-1]
    if not rope.frequencies or 2 * len(rope.frequencies) > n_dims:
        raise InputError(
            f"rope: expected 1 to {n_dims // 2} frequencies for layer {number}, found "
            f"{len(rope.frequencies)}"
        )
    allowed = _TOLERANCES[model.cache.layer(number).k.spec.dtype]
    error = max(rope.error(keys) for keys in rows)
    if error > allowed:
        best = measure(rows)
        raise InputError(
            f"rope: layer {number}: expected keys of equal tokens that differ by the rotation "
            f"alone, to {allowed:g} of the largest, found {error:.3g}; measured are "
            f"{best.pairing} pairs with frequencies from {best.frequencies[0]:.6g} to "
            f"{best.frequencies[-1]:.6g}, given {rope.pairing} from {rope.frequencies[0]:.6g} to "
            f"{rope.frequencies[-1]:.6g}"
        )
    return CheckedRope(rope=rope, reach_n_tokens=math.inf)


def strike(cache: LiveTensors, rope: RopeSpec, start: int, stop: int) -> None:
    """Drop the tokens ``[start, stop)``; the others move up. An edit from ``start`` on.

    Raises:
        RewindError: a ring no longer has what the result needs; nothing was changed.
    """
    n_dropped = stop - start
    n_tokens = cache.n_tokens - n_dropped
    moves = [
        move
        for spec in cache.layout.tensors
        for move in _moves(cache, spec, start=start, n_dropped=n_dropped, n_tokens=n_tokens)
    ]
    turned = {
        number: _turn(cache, number, rope[number], moves, n_dropped)
        for number, layer in layers_of(cache).items()
        if "k" in layer
    }
    tokens = (*cache.tokens[:start], *cache.tokens[stop:])
    # All is read by now: from here on the cache is another one.
    held = Held(n_tokens=n_tokens, peak_n_tokens=n_tokens, restored_n_tokens=n_tokens)
    edit = _edit_of(cache, rope, start, stop)
    cache.edit(tokens, held, Edit(start, os.urandom(32)))  # until all of it is written
    for move in moves:
        rows = turned.get(move.spec.layer, {}).get((move.spec.role, move.to), move.rows)
        cache[move.spec.name].write(move.to, rows)
    for spec in cache.layout.tensors:
        elements = spec.kind.rules.derived(spec, n_tokens)
        if elements is not None:
            live = cache.live(spec.name)
            live.copy_(live.new_tensor(elements))
    cache.edit(tokens, held, edit)


def _edit_of(cache: LiveTensors, rope: RopeSpec, start: int, stop: int) -> Edit:
    """What a strike is to those who look for its result: all that decides it.

    The tokens that stay are in the keys anyway. Which of them were moved, and which computed
    since, is told apart by the number that the cache held.
    """
    hasher = hashlib.blake2b(digest_size=32, person=b"kvstore/strike")
    hasher.update(struct.pack("<QQQ", start, stop, cache.n_tokens))
    hasher.update(struct.pack(f"<{stop - start}Q", *cache.tokens[start:stop]))
    for number, layer in sorted(rope.items()):
        pairing = str(layer.pairing).encode("ascii")
        n_frequencies = len(layer.frequencies)
        hasher.update(struct.pack("<QQQ", number, len(pairing), n_frequencies) + pairing)
        hasher.update(struct.pack(f"<{n_frequencies}d", *layer.frequencies))
    for edit in cache.edits:
        if edit.start >= start:  # it is part of this one from now on
            hasher.update(struct.pack("<QB", edit.start, len(edit.digest)) + edit.digest)
    return Edit(start, hasher.digest())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Move:
    """Rows of one tensor, and the position that the first of them goes to."""

    spec: TensorSpec
    to: int
    rows: torch.Tensor


def _moves(
    cache: LiveTensors, spec: TensorSpec, *, start: int, n_dropped: int, n_tokens: int
) -> list[_Move]:
    rules, view = spec.kind.rules, cache[spec.name]
    found = []
    for first, last in rules.required(spec, n_tokens):
        stays, moved = (first, min(last, start)), (max(first, start), last)
        sources = [stays, (moved[0] + n_dropped, moved[1] + n_dropped)]
        for a, b in sources:
            if a < b and not any(x <= a and b <= y for x, y in view.valid):
                raise RewindError(
                    f"strike: {spec.name} no longer has positions [{a}, {b}) of its window; use "
                    "replace(start, stop, []) instead"
                )
        if moved[0] < moved[1]:
            rows = view.get(moved[0] + n_dropped, moved[1] + n_dropped)
            found.append(_Move(spec=spec, to=moved[0], rows=rows))
    return found


def _turn(
    cache: LiveTensors, number: int, rope: LayerRope, moves: list[_Move], n_dropped: int
) -> dict[tuple[str, int], torch.Tensor]:
    """The keys among ``moves`` of one layer, turned back, by role and position."""
    layer = cache.layer(number)
    found: dict[tuple[str, int], torch.Tensor] = {}
    for move in moves:
        if (move.spec.layer, move.spec.role) != (number, "k"):
            continue
        source = move.to + n_dropped
        keys = read_keys(layer, source, source + len(move.rows))
        new = keys.with_numbers(rope.rotate(keys.numbers(), -n_dropped))
        found.update({(role, move.to): rows for role, rows in new.rows.items()})
    return found


def _sample(model: Model) -> Samples:
    """The keys of a few tokens, each repeated: as many positions of each as a layer shows.

    The first one goes on past the end of the smallest ring, so that keys which follow the slot
    and not the position are seen to be no rotation.
    """
    cache = model.cache
    n_positions = min(_SAMPLE_N_POSITIONS, cache.capacity_n_tokens)
    ring = min(
        (spec.capacity_n_tokens for spec in cache.layout.tensors if spec.window_n_tokens),
        default=1,
    )
    around = max(n_positions, ring) // ring * ring  # a multiple of the ring: there it starts anew
    lengths = [min(around + min(ring // 4, n_positions // 2), cache.capacity_n_tokens)]
    lengths += [n_positions] * (_SAMPLE_N_TOKENS - 1)
    n_samples = _SAMPLE_N_TOKENS if model.piece_n_tokens > 1 else _SAMPLE_N_TOKENS_SLOWLY
    before = cache.copy_all()
    samples: dict[int, list[Any]] = {}
    try:
        step = max(1, model.vocab_size // (n_samples + 1))
        for number, length in zip(range(1, n_samples + 1), lengths, strict=False):
            cache.truncate(0)
            model.forward([number * step] * length, start=0)
            for layer, view in layers_of(cache).items():
                if "k" in view:
                    start, stop = view.k.valid[-1]
                    samples.setdefault(layer, []).append(read_keys(view, start, stop).numbers())
    finally:
        cache.put_back(before)
    shown = {layer: min(map(len, rows)) for layer, rows in samples.items()}
    return {layer: [keys[-shown[layer] :] for keys in rows] for layer, rows in samples.items()}
