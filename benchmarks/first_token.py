"""How long until the first token of a prompt: restored, beside computed again.

    python benchmarks/first_token.py [--model my.pte] [--lengths 64 256 1024] [--codecs exact]

The peer is what an app does today after a restart: the same program prefills the whole prompt.
The ceiling is what a restore that takes no time would reach: prefill / one decode step.
Without --model it is a seeded Llama of 124M parameters (``program.py``).
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import program
from contest import add_codecs, open_stores
from measure import Column, Plot, Result, Spread, spread, timed

import kvstore

TARGET_LENGTH = 2000
WITH_LOGITS = "kvstore, a Session with its logits stored"
LENGTHS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, TARGET_LENGTH, 4096)
QUICK_LENGTHS = (64, 512, TARGET_LENGTH)
_COLUMNS = (
    Column("length", "tokens", "count"),
    Column("who", "restored by"),
    Column("prefill", "computed, ms", "ms"),
    Column("restore", "restored, ms", "ms"),
    Column("load", "of it loading, ms", "ms"),
    Column("ratio", "computed / restored", "x"),
    Column("ceiling", "ceiling", "x"),
    Column("share", "share of ceiling", "x"),
)


def main() -> None:
    """One line for each length and codec."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--rounds", type=int)
    add_codecs(parser)
    arguments = parser.parse_args()
    measure.confine()
    result = Result(
        name="first_token",
        question="How long until the first token of a prompt, restored or computed again?",
        method=(
            "Time from an emptied live cache to the next token's logits. Computed: the same "
            "program prefills all tokens. Restored: `load_session`, then one step for the last "
            "token; a `Session` that stored its logits needs none. Ceiling: prefill / one decode "
            "step at that length, which a restore in no time at all would reach. "
        ),
    )
    reason = program.unavailable()
    if reason is not None:
        result.notes.append(f"Not measured: {reason}.")
        judge(result, {}, {})
    else:
        run(result, arguments)
    measure.finish(result, arguments.json)


def run(result: Result, arguments: argparse.Namespace) -> None:
    """Measure each length in turn."""
    from runtime_adapter import Model

    path = arguments.model or program.path()
    n_rounds = arguments.rounds or (1 if arguments.quick else 3)
    lengths = arguments.lengths or (QUICK_LENGTHS if arguments.quick else LENGTHS)
    with ExitStack() as stack:
        model = stack.enter_context(Model.open(path))
        folder = Path(stack.enter_context(TemporaryDirectory(dir=measure.scratch())))
        kib = model.layout.token_nbytes / 1024
        result.method += f"`{path.name}`, {kib:.0f} KiB of K and V a token; {n_rounds} rounds."
        stores, absent = open_stores(stack, folder, arguments.codecs)
        result.notes += [f"{who}: {reason}." for who, reason in absent.items()]
        table = result.table(f"{path.stem}, two processors", *_COLUMNS)
        generator = random.Random(0)  # not for security
        prompt = [generator.randrange(model.vocab_size) for _ in range(max(lengths) + 1)]
        model.forward(prompt[:64], start=0)  # the runtime's first steps take longer
        shares: dict[tuple[str, int], tuple[float, float]] = {}
        ratios: dict[str, list[tuple[int, float]]] = {}
        for length in lengths:
            if length >= model.capacity_n_tokens:
                continue
            measured = one_length(model, stores, prompt[:length], prompt[length], n_rounds)
            prefill, step = measured["prefill"], measured["step"]
            for who in [*stores, WITH_LOGITS]:
                restore = measured[who]
                ratio, ceiling = prefill / restore, prefill / step
                ratios.setdefault(who, []).append((length, ratio))
                shares[who, length] = (ratio, ratio / ceiling)
                table.add(
                    length=length,
                    who=who,
                    prefill=prefill,
                    restore=restore,
                    load=measured[f"{who}, load"],
                    ratio=ratio,
                    ceiling=ceiling,
                    share=ratio / ceiling,
                )
            ratios.setdefault("ceiling", []).append((length, prefill / step))
    judge(result, ratios, shares)
    result.plots.append(
        Plot(
            name="first-token",
            title=f"First token: computed / restored, {path.stem}",
            x_label="tokens in the prompt",
            y_label="times faster",
            series=ratios,
        )
    )


def one_length(
    model: object,
    stores: dict[str, kvstore.Store],
    ids: Sequence[int],
    following: int,
    n_rounds: int,
) -> dict[str, Spread]:
    """Seconds of prefill, step and restores, by turns into the same live cache."""
    from runtime_adapter import Session

    with_logits = next(iter(stores.values()))
    found: dict[str, list[float]] = {}

    def add(name: str, seconds: float) -> None:
        found.setdefault(name, []).append(seconds)

    for round_index in range(n_rounds):
        for _ in range(5 if len(ids) <= 256 else 1):
            model.cache.truncate(0)
            add("prefill", timed(lambda: model.forward(ids, start=0)))
        if round_index == 0:
            for store in stores.values():
                store.save_session(model.cache, ids)
            save_with_logits(model, with_logits, ids)
        for _ in range(5):
            model.cache.truncate(len(ids))
            add("step", timed(lambda: model.forward([following], start=len(ids))))
        for repeat in range(6):
            for who, store in stores.items():
                model.cache.truncate(0)
                began = time.perf_counter()
                hit = store.load_session(model.cache, ids)
                model.forward(ids[hit.n_tokens :], start=hit.n_tokens)
                seconds = time.perf_counter() - began
                if hit.n_tokens < len(ids) - 1:
                    raise SystemExit(f"restored {hit.n_tokens} of {len(ids)}: {hit.detail}")
                if repeat:  # the first one warms up
                    add(who, seconds)
                    add(f"{who}, load", hit.seconds)
            model.cache.truncate(0)
            began = time.perf_counter()
            with Session(model, with_logits, str(len(ids)), store_logits=True) as session:
                loaded = time.perf_counter() - began
                session.logits  # noqa: B018  # computed here, if they were not stored
                seconds = time.perf_counter() - began
            if repeat:
                add(WITH_LOGITS, seconds)
                add(f"{WITH_LOGITS}, load", loaded)
    return {name: spread(values) for name, values in found.items()}


def save_with_logits(model: object, store: kvstore.Store, ids: Sequence[int]) -> None:
    """A conversation of ``ids``, with what the model expects next."""
    from runtime_adapter import Session

    model.cache.truncate(0)
    with Session(model, store, str(len(ids)), store_logits=True) as session:
        session.append(ids)
        session.save()


def judge(
    result: Result,
    ratios: dict[str, list[tuple[int, float]]],
    shares: dict[tuple[str, int], tuple[float, float]],
) -> None:
    """Hold what was found against what is wanted."""
    who = "kvstore exact" if "kvstore exact" in ratios else next(iter(ratios), "kvstore")
    ratio, share = shares.get((who, TARGET_LENGTH), (None, None))
    result.target(
        f"{who}, 2,000 tokens: at least half of this machine's ceiling",
        share,
        0.5,
        found="" if ratio is None else f"{share:.2f} of the ceiling ({ratio:.0f}x a prefill)",
    )
    ratio, _ = shares.get((WITH_LOGITS, TARGET_LENGTH), (None, None))
    result.target("2,000 tokens with stored logits: at least 100x a prefill", ratio, 100.0)
    if ratios:
        result.notes.append(f"Break-even, {who}: {break_even(ratios[who])}.")


def break_even(points: list[tuple[int, float]]) -> str:
    """The length from which a restore is faster than a prefill, in words."""
    above = [length for length, ratio in points if ratio >= 1]
    if not above:
        return f"not reached up to {points[-1][0]:,} tokens"
    if points[0][1] >= 1:
        return f"a restore is faster at every length measured, from {points[0][0]:,} tokens"
    for (short, low), (long, high) in pairwise(points):
        if low < 1 <= high:
            length = short + (1 - low) / (high - low) * (long - short)
            return f"a restore is faster from about {length:,.0f} tokens (between measured ones)"
    return "no single length"


if __name__ == "__main__":
    main()
