"""What saving one more turn costs as a conversation grows, beside writing all of it again.

    python benchmarks/save.py [--turn-n-tokens 64] [--lengths 1000 2000 4000] [--dtypes ...]

A save is durable: synced to the disk, and the old state stays until the new one is whole. kvstore
does that by itself; the peers' files are synced here and renamed into place. Needs no ExecuTorch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import contest
import measure
import numpy as np
import peers
from measure import Column, Plot, Result, Table, spread, timed
from synthetic import SyntheticCache, llama_1b_layout, random_ids

import kvstore

_COLUMNS = (
    Column("length", "tokens", "count"),
    Column("who", "saved by"),
    Column("seconds", "ms", "ms"),
    Column("mean", "mean ms", "ms"),
    Column("nbytes", "MB written", "MB"),
    Column("time_ratio", "time: llama.cpp / it", "x"),
    Column("nbytes_ratio", "bytes: llama.cpp / it", "x"),
)
TARGET_LENGTH = 4000


@dataclass(slots=True)
class Cost:
    """Of the turns that were saved at about one length."""

    seconds: list[float] = field(default_factory=list)
    nbytes: list[float] = field(default_factory=list)

    def add(self, seconds: float, nbytes: int | None) -> None:
        """One turn more."""
        self.seconds.append(seconds)
        if nbytes is not None:
            self.nbytes.append(nbytes)


def main() -> None:
    """One table for each dtype."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--turn-n-tokens", type=int, default=64)
    parser.add_argument("--lengths", nargs="+", type=int)
    parser.add_argument("--turns", type=int, help="turns measured at each length")
    contest.add_options(parser)
    parser.add_argument("--dtypes", nargs="+")
    arguments = parser.parse_args()
    n_turns = arguments.turns or (8 if arguments.quick else 16)
    lengths = arguments.lengths or ([1000, 4000] if arguments.quick else [500, 1000, 2000, 4000])
    dtypes = arguments.dtypes or (
        ["bfloat16"] if arguments.quick else ["bfloat16", "float16", "float32"]
    )
    measure.confine()
    values, content = contest.content(arguments)
    result = Result(
        name="save",
        question="What does saving one more turn cost as a conversation grows?",
        method=(
            f"{contest.SHAPE}, filled with {content}. At each length {n_turns} turns of "
            f"{arguments.turn_n_tokens} tokens are added, and each is saved durably by everyone in "
            "turn. Bytes are those that the process hands to the system to write: for kvstore that "
            "is SQLite's log, and its copy into the file when a checkpoint comes. Peers write "
            "their whole state into a new file, which is synced and renamed. Now and then a "
            "save of kvstore completes a chunk and costs more: times are compared by medians "
            "(the means stand beside them), bytes by their sums over all turns."
        ),
    )
    for dtype in dtypes:
        costs = one_dtype(
            dtype,
            turn_n_tokens=arguments.turn_n_tokens,
            lengths=lengths,
            n_turns=n_turns,
            codecs=arguments.codecs,
            peer_names=arguments.peers,
            values=values,
            result=result,
        )
        judge(result, dtype, costs, lengths)
    measure.finish(result, arguments.json)


def one_dtype(
    dtype: str,
    *,
    turn_n_tokens: int,
    lengths: list[int],
    n_turns: int,
    codecs: list[str],
    peer_names: list[str],
    values: np.ndarray | None,
    result: Result,
) -> dict[tuple[str, int], Cost]:
    """Costs by contender and length."""
    capacity = max(lengths) + n_turns * turn_n_tokens
    layout = llama_1b_layout(capacity_n_tokens=capacity, dtype=dtype)
    cache = SyntheticCache(layout, values=values)
    ids = random_ids(capacity)
    costs: dict[tuple[str, int], Cost] = {}
    absent = {name: peers.not_installed(name) for name in peer_names}
    present = [name for name, reason in absent.items() if reason is None]
    llama = None
    if peers.LLAMA in present:
        llama = peers.LlamaCpp(
            n_tokens=max(lengths), dtype=dtype, spare_n_tokens=n_turns * turn_n_tokens
        )
    table = result.table(
        f"{dtype}, {layout.token_nbytes / 1024:.0f} KiB a token, "
        f"{turn_n_tokens} tokens a turn ({turn_n_tokens * layout.token_nbytes / 1e6:.2f} MB)",
        *_COLUMNS,
    )
    for length in sorted(
        lengths, reverse=True
    ):  # longest first: going back costs llama.cpp nothing
        cache.truncate(0)
        cache.extend(ids[:length])
        if llama is not None:
            llama.truncate(length)
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory(dir=measure.scratch())))
            savers = durable_savers(
                stack, folder, cache, llama, codecs=codecs, peer_names=present, dtype=dtype
            )
            for turn in range(-1, n_turns):  # the first one is not measured
                if turn >= 0:
                    start = length + turn * turn_n_tokens
                    cache.extend(ids[start : start + turn_n_tokens])
                    if llama is not None:
                        llama.extend(turn_n_tokens)
                for who, seconds, nbytes in one_turn(savers, first=turn):
                    if turn >= 0:
                        costs.setdefault((who, length), Cost()).add(seconds, nbytes)
        rows(table, costs, length)
    table.rows.sort(key=lambda row: row["length"])
    if llama is not None:
        llama.close()
    for who, reason in absent.items():
        note = f"{who}: {reason}."
        if reason is not None and note not in result.notes:
            result.notes.append(note)
    return costs


def durable_savers(
    stack: ExitStack,
    folder: Path,
    cache: SyntheticCache,
    llama: peers.LlamaCpp | None,
    *,
    codecs: list[str],
    peer_names: list[str],
    dtype: str,
) -> dict[str, Callable[[], Callable[[], object]]]:
    """By contender, what prepares a durable save of what the cache holds at that moment."""
    savers: dict[str, Callable[[], Callable[[], object]]] = {}
    with ExitStack() as first:
        for store in contest.open_stores(first, folder, codecs)[0].values():
            store.save_session(cache, cache.tokens, name="chat")
    # Opened anew: SQLite's copy of what came before into the file is no part of the turns.
    stores, _ = contest.open_stores(stack, folder, codecs)
    ids = list(cache.tokens)
    for who, store in stores.items():
        store.load_session(cache, name="chat")
        cache.extend(ids[len(cache.tokens) :])  # a load leaves the last token to be computed
        savers[who] = lambda store=store: _saving(store, cache)
    for index, who in enumerate(peer_names):
        path = folder / f"whole-{index}"
        if who == peers.LLAMA and llama is not None:
            savers[who] = lambda path=path: _writing(llama, path)
        else:
            savers[who] = lambda who=who, path=path: _writing(
                peers.make(who, cache, n_tokens=len(cache.tokens), dtype=dtype), path
            )
    return savers


def one_turn(
    savers: dict[str, Callable[[], Callable[[], object]]], *, first: int
) -> Iterator[tuple[str, float, int | None]]:
    """Each contender saves; its seconds, and the bytes that it wrote."""
    names = list(savers)
    first %= len(names)
    for who in names[first:] + names[:first]:
        save = savers[who]()
        before = measure.written_nbytes()
        seconds = timed(save)
        after = measure.written_nbytes()
        yield who, seconds, None if before is None or after is None else after - before


def rows(table: Table, costs: dict[tuple[str, int], Cost], length: int) -> None:
    """Add what was found at one length."""
    llama = costs.get((peers.LLAMA, length))
    for (who, at), cost in costs.items():
        if at == length:
            ratios = [None, None] if llama is None or cost is llama else _ratios(llama, cost)
            table.add(
                length=length,
                who=who,
                seconds=spread(cost.seconds),
                mean=sum(cost.seconds) / len(cost.seconds),
                nbytes=spread(cost.nbytes) if cost.nbytes else None,
                time_ratio=ratios[0],
                nbytes_ratio=ratios[1],
            )


def _ratios(peer: Cost, cost: Cost) -> list[float | None]:
    """How many times the time, and the bytes, the peer takes.

    Bytes by the mean: a checkpoint comes only now and then, and counts too.
    """
    return [
        spread(peer.seconds) / spread(cost.seconds),
        sum(peer.nbytes) / sum(cost.nbytes) if cost.nbytes else None,
    ]


def _saving(store: kvstore.Store, cache: SyntheticCache) -> Callable[[], object]:
    return lambda: store.save_session(cache, cache.tokens, name="chat")


def _writing(peer: peers.Peer, path: Path) -> Callable[[], object]:
    """Save durably: a new file, synced, renamed over the old one; then the folder is synced."""

    def write() -> None:
        partial = path.with_suffix(".new")
        peer.save(partial)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)

    return write


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def judge(
    result: Result, dtype: str, costs: dict[tuple[str, int], Cost], lengths: list[int]
) -> None:
    """Hold what was found against what is wanted, and plot it."""
    store = next((who for who, _ in costs if who == "kvstore exact"), next(iter(costs))[0])
    mine, llama = costs.get((store, TARGET_LENGTH)), costs.get((peers.LLAMA, TARGET_LENGTH))
    if dtype != "float32":
        ratios = [None, None] if mine is None or llama is None else _ratios(llama, mine)
        for ratio, what in zip(ratios, ("time", "bytes"), strict=True):
            result.target(
                f"{store}, {dtype}, a turn at 4,000 tokens: at most 1/20 of llama.cpp's {what}",
                ratio,
                20.0,
            )
    if dtype != "float32" and len(lengths) > 1:
        first, last = (spread(costs[store, length].seconds) for length in (lengths[0], lengths[-1]))
        growth = last / first
        result.target(
            f"{store}, {dtype}: a turn's save does not grow with the context (at most 1.25 times "
            f"from {lengths[0]:,} to {lengths[-1]:,} tokens)",
            1.25 / growth,
            1.0,
            found=f"{growth:.2f} times",
        )
    contenders = dict.fromkeys(who for who, _ in costs)
    for key, label, values in (
        ("time", "ms", lambda cost: spread(cost.seconds).median * 1e3),
        ("bytes", "MB", lambda cost: sum(cost.nbytes) / max(1, len(cost.nbytes)) / 1e6),
    ):
        result.plots.append(
            Plot(
                name=f"save-{key}-{dtype}",
                title=f"Saving a turn of 64 tokens durably, {dtype}",
                x_label="tokens in the conversation",
                y_label=label,
                series={
                    who: [(length, values(costs[who, length])) for length in lengths]
                    for who in contenders
                },
            )
        )


if __name__ == "__main__":
    main()
