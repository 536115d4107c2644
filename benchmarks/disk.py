"""Which restore is faster when storage is the bottleneck: fewer bytes, or plain ones.

    python benchmarks/disk.py [--rates 0.5 1 1.5 3] [--codecs exact] [--dtypes bfloat16 float32]

Storage is simulated: ``throttle.py`` says how, and what that leaves out.
"""

from __future__ import annotations

import math

import contest
import measure
import peers
import throttle
from measure import Column, Plot, Result, Table, interleaved

_COLUMNS = (
    Column("rate", "disk"),
    Column("who", "restored by"),
    Column("read", "MB read", "MB"),
    Column("seconds", "ms", "ms"),
    Column("ratio", "llama.cpp / it", "x"),
    Column("note", "note"),
)
_PEERS = (peers.LLAMA, "flat file")


def main() -> None:
    """One table for each dtype, one line for each rate and contender."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--n-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rates", nargs="+", type=float, help="GB/s")
    contest.add_options(parser)
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float32"))
    arguments = parser.parse_args()
    reason = throttle.unavailable()
    if reason is None and not throttle.is_loaded():
        throttle.restart()
    n_rounds = arguments.rounds or (3 if arguments.quick else 7)
    rates = arguments.rates or ([1.5] if arguments.quick else [0.5, 1.0, 1.5, 3.0])
    measure.confine()
    values, content = contest.content(arguments)
    result = Result(
        name="disk",
        question="Which restore is faster when storage is the bottleneck?",
        method=(
            f"SIMULATED storage: the files ({arguments.n_tokens:,} tokens of {contest.SHAPE}, "
            f"filled with {content}) lie in the page cache, and every read call of the process, "
            "whoever makes it, ends no sooner than a disk of that rate would have delivered its "
            f"bytes, with {throttle.READAHEAD_NBYTES // 1024} KiB of readahead. Seeks, queues and "
            f"a real disk's processor time are left out. {n_rounds} interleaved rounds."
        ),
    )
    if reason is not None:
        result.notes.append(f"Not measured: {reason}.")
        rates = []
    ratios: dict[tuple[str, float, str], float] = {}
    for dtype in arguments.dtypes:
        with contest.contest(
            dtype,
            n_tokens=arguments.n_tokens,
            codecs=arguments.codecs,
            peer_names=[name for name in _PEERS if name in arguments.peers] if rates else [],
            values=values,
        ) as held:
            del held.contenders["memcpy"]
            table = result.table(f"{dtype}, {held.raw_nbytes / 1e6:.0f} MB of K and V", *_COLUMNS)
            result.notes += [
                note
                for note in (f"{who}: {reason}." for who, reason in held.absent.items())
                if note not in result.notes
            ]
            for rate in rates:
                one_rate(table, held, rate, n_rounds, key=dtype, ratios=ratios)
    judge(result, rates, ratios)
    measure.finish(result, arguments.json)


def one_rate(
    table: Table,
    held: contest.Contest,
    rate: float,
    n_rounds: int,
    *,
    key: str,
    ratios: dict[tuple[str, float, str], float],
) -> None:
    """Restore by everyone, by turns, from a disk of ``rate`` GB/s."""
    read: dict[str, int] = {}
    with throttle.disk(rate * 1e9):
        for who, contender in held.contenders.items():
            if contender.before is not None:
                contender.before()
            before = throttle.counted_nbytes()
            contender.run()
            read[who] = throttle.counted_nbytes() - before
        took = interleaved(held.contenders, n_rounds=n_rounds, n_warmups=0)
    llama = took.get(peers.LLAMA)
    for who, seconds in took.items():
        ratio = llama / seconds if llama is not None and who != peers.LLAMA else None
        is_seen = read[who] >= 0.9 * held.file_nbytes[who]
        if ratio is not None and is_seen:
            ratios[key, rate, who] = ratio
        table.add(
            rate=f"{rate:g} GB/s",
            who=who,
            read=read[who],
            seconds=seconds,
            ratio=ratio,
            note="" if is_seen else "NOT COMPARABLE: not all of its reads are seen",
        )


def judge(result: Result, rates: list[float], ratios: dict[tuple[str, float, str], float]) -> None:
    """Hold what was found against what is wanted, and plot it."""
    for dtype in ("bfloat16", "float32"):
        slow = [
            ratio
            for (of, rate, who), ratio in ratios.items()
            if of == dtype and rate <= 1.5 and who == "kvstore exact"
        ]
        result.target(
            f"`exact`, {dtype}: faster than llama.cpp where storage gives 1.5 GB/s or less "
            "(the least of the rates)",
            min(slow, default=None),
            math.nextafter(1.0, 2.0),
        )
    series: dict[str, list[tuple[float, float]]] = {}
    for (of, rate, who), ratio in ratios.items():
        series.setdefault(f"{who}, {of}", []).append((rate, ratio))
    if len(rates) > 1:
        result.plots.append(
            Plot(
                name="disk",
                title="Restoring from a simulated disk, times llama.cpp's speed",
                x_label="disk, GB/s",
                y_label="llama.cpp's time / its time",
                series=series,
                is_log=False,
            )
        )


if __name__ == "__main__":
    main()
