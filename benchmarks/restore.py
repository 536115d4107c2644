"""How fast a stored cache comes back, beside llama.cpp and others.

    python benchmarks/restore.py [--n-tokens 2048] [--codecs raw exact] [--dtypes bfloat16 ...]

A cache of Llama-3.2-1B's shape, restored into memory that held something before, from files in
the page cache. kvstore verifies every checksum; no peer has any. Needs no ExecuTorch.
"""

from __future__ import annotations

import contest
import measure
import numpy as np
import peers
from measure import Column, Plot, Result, interleaved

DTYPES = ("bfloat16", "float16", "float32")
_COLUMNS = (
    Column("who", "restored by"),
    Column("file", "file MB", "MB"),
    Column("seconds", "ms", "ms"),
    Column("rate", "GB/s of K and V", "GB/s"),
    Column("ratio", "llama.cpp / it", "x"),
    Column("note", "note"),
)


def main() -> None:
    """One table for each dtype."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--n-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int)
    contest.add_options(parser)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    arguments = parser.parse_args()
    n_rounds = arguments.rounds or (5 if arguments.quick else 15)
    measure.confine()
    values, content = contest.content(arguments)
    result = Result(
        name="restore",
        question="How fast does a stored cache come back?",
        method=(
            f"{arguments.n_tokens:,} tokens of {contest.SHAPE}, filled with {content}; files in "
            "the page cache. kvstore verifies a checksum of every byte and works in two threads "
            "(*mapped*: with `mmap=True`; lossy codecs compute in torch); "
            "no peer verifies anything, and each works in one. llama.cpp's 16-bit cache is f16. "
            f"{n_rounds} interleaved rounds."
        ),
    )
    ratios: dict[tuple[str, str], float] = {}
    for dtype in arguments.dtypes:
        one_dtype(
            result,
            dtype,
            n_tokens=arguments.n_tokens,
            codecs=arguments.codecs,
            peer_names=arguments.peers,
            values=values,
            n_rounds=n_rounds,
            ratios=ratios,
        )
    judge(result, ratios)
    result.plots.append(
        Plot(
            name="restore",
            title="Restoring, times llama.cpp's speed",
            x_label="",
            y_label="llama.cpp's time / its time",
            series={
                dtype: [(who, ratio) for (of, who), ratio in ratios.items() if of == dtype]
                for dtype in arguments.dtypes
            },
            kind="bars",
            is_log=False,
        )
    )
    measure.finish(result, arguments.json)


def one_dtype(
    result: Result,
    dtype: str,
    *,
    n_tokens: int,
    codecs: list[str],
    peer_names: list[str],
    values: np.ndarray | None,
    n_rounds: int,
    ratios: dict[tuple[str, str], float],
) -> None:
    """Restore by everyone, by turns; fills ``ratios`` by dtype and contender."""
    with contest.contest(
        dtype,
        n_tokens=n_tokens,
        codecs=codecs,
        peer_names=peer_names,
        values=values,
        mapped=("exact", "raw"),
    ) as held:
        took = interleaved(held.contenders, n_rounds=n_rounds, n_warmups=2)
        table = result.table(f"{dtype}, {held.raw_nbytes / 1e6:.0f} MB of K and V", *_COLUMNS)
        llama = took.get(peers.LLAMA)
        for who, seconds in took.items():
            ratio = None
            if llama is not None and who not in (peers.LLAMA, "memcpy"):
                ratio = ratios[dtype, who] = llama / seconds
            table.add(
                who=who,
                file=held.file_nbytes.get(who),
                seconds=seconds,
                rate=seconds.per(held.raw_nbytes),
                ratio=ratio,
            )
        for who, reason in held.absent.items():
            table.add(who=who, note=reason)


def judge(result: Result, ratios: dict[tuple[str, str], float]) -> None:
    """Hold what was found against what is wanted."""
    for dtype in DTYPES:
        result.target(
            f"`raw`, {dtype}: at least 1.0x llama.cpp's bytes a second, checksummed",
            ratios.get((dtype, "kvstore raw")),
            1.0,
        )
    for dtype in ("bfloat16", "float32"):
        result.target(
            f"`exact`, {dtype}: at least 0.7x llama.cpp's bytes a second",
            ratios.get((dtype, "kvstore exact")),
            0.7,
        )
    result.target(
        "`int8` into bfloat16: less time than llama.cpp's 16-bit cache",
        ratios.get(("bfloat16", "kvstore int8")),
        1.0,
    )


if __name__ == "__main__":
    main()
