"""Dropping tokens from the middle of a live cache: what follows moves up, its keys turned back.

Approximate by nature: keys and values behind the dropped range were computed with it in view.
Only the first layer's keys come out as if they had been computed at their new place.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore import Held, TensorSpec
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

_checked: weakref.WeakKeyDictionary[LiveTensors, list[tuple[RopeSpec | None, RopeSpec]]] = (
    weakref.WeakKeyDictionary()
)
"""What was given (None: nothing) and checked, and what is used then, by model."""


def check_kinds(cache: LiveTensors) -> None:
    """Refuse a cache from whose middle nothing can be dropped.

    Raises:
        UnsupportedStateError: recurrent state, keys and values that cannot be told apart, or keys
            whose numbers cannot be read.
    """
    for spec in cache.layout.tensors:
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


def rope_of(model: Model, given: RopeSpec | None = None) -> RopeSpec:
    """The rotation of every layer's keys: ``given``, or measured; checked on the model.

    The model computes a few tokens, each repeated many times: attention over equal values is
    that value, so in every layer such keys differ by their rotation alone. What the cache
    held is put back. Done once a model, and once more for each other rotation that is given.

    Raises:
        InputError: ``given`` lacks a layer, or does not fit what the model computes.
        UnsupportedStateError: no rotation fits.
    """
    checked = _checked.setdefault(model.cache, [])
    for before, used in checked:
        if before == given:
            return used
    samples = _sample(model)
    spec = dict(given) if given is not None else {n: measure(keys) for n, keys in samples.items()}
    for number, keys in samples.items():
        layer = model.cache.layer(number)
        if number not in spec:
            raise InputError(f"rope: expected a rotation for layer {number}, found none")
        n_dims = keys[0].shape[-1]
        if 2 * len(spec[number].frequencies) > n_dims:
            raise InputError(
                f"rope: expected at most {n_dims // 2} frequencies for layer {number}, found "
                f"{len(spec[number].frequencies)}"
            )
        error = max(spec[number].error(rows) for rows in keys)
        allowed = _TOLERANCES[layer.k.spec.dtype]
        if error > allowed:
            told = (
                f"layer {number}: expected keys that differ by the rotation alone, to {allowed:g} "
                f"of the largest, found {error:.3g}"
            )
            if given is not None:
                best = measure(keys)
                raise InputError(
                    f"rope: {told}; measured are {best.pairing} pairs with frequencies from "
                    f"{best.frequencies[0]:.6g} to {best.frequencies[-1]:.6g}, given "
                    f"{spec[number].pairing} from {spec[number].frequencies[0]:.6g} to "
                    f"{spec[number].frequencies[-1]:.6g}"
                )
            raise UnsupportedStateError(
                f"strike: {told}; this model places its tokens in another way: use "
                "replace(start, stop, []) instead"
            )
    checked.append((given, spec))
    return spec


def strike(cache: LiveTensors, rope: RopeSpec, start: int, stop: int) -> None:
    """Drop the tokens ``[start, stop)``; the others move up. Marks the cache from ``start`` on.

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
    cache.edit(tokens, held, start=start, reason=f"tokens [{start}, {stop}) were struck out")
    for move in moves:
        rows = turned.get(move.spec.layer, {}).get((move.spec.role, move.to), move.rows)
        cache[move.spec.name].write(move.to, rows)
    for spec in cache.layout.tensors:
        elements = spec.kind.rules.derived(spec, n_tokens)
        if elements is not None:
            live = cache.live(spec.name)
            live.copy_(live.new_tensor(elements))


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


def _sample(model: Model) -> dict[int, list[Any]]:
    """Per layer with keys: those of a few tokens, each at positions 0, 1, ..."""
    cache = model.cache
    room = min(
        [
            _SAMPLE_N_POSITIONS,
            cache.capacity_n_tokens,
            *(spec.window_n_tokens for spec in cache.layout.tensors if spec.window_n_tokens),
        ]
    )
    before = cache.copy_all()
    samples: dict[int, list[Any]] = {}
    try:
        n_samples = _SAMPLE_N_TOKENS if model.piece_n_tokens > 1 else _SAMPLE_N_TOKENS_SLOWLY
        step = max(1, model.vocab_size // (n_samples + 1))
        for token in range(step, step * (n_samples + 1), step):
            cache.truncate(0)
            model.forward([token] * room, start=0)
            for number, layer in layers_of(cache).items():
                if "k" in layer:
                    samples.setdefault(number, []).append(read_keys(layer, 0, room).numbers())
    finally:
        cache.put_back(before)
    return samples
