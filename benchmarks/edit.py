"""What changing a conversation costs, beside computing the result from the start.

    python benchmarks/edit.py [--model my.pte --n-tokens 1500]

The peer of every row is a whole prefill of the tokens that are left, by the same program in the
same run. The demo's model by default.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import program
from measure import Column, Result, spread, timed

import kvstore

N_GENERATED = 32
_COLUMNS = (
    Column("what", "change"),
    Column("seconds", "ms", "ms"),
    Column("computed", "computed", "count"),
    Column("prefill", "prefill, ms", "ms"),
    Column("ratio", "prefill / change", "x"),
)


def main() -> None:
    """One line a change."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--n-tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    n_rounds = arguments.rounds or (2 if arguments.quick else 5)
    measure.confine()
    result = Result(
        name="edit",
        question="What does changing a conversation cost?",
        method=(
            f"A `Session` of {arguments.n_tokens:,} tokens of prompt and {N_GENERATED} generated "
            "ones is changed; the peer prefills what is left, by the same program, right after. "
            f"{n_rounds} rounds."
        ),
    )
    reason = program.unavailable()
    if reason is None:
        run(result, arguments, n_rounds)
    else:
        result.notes.append(f"Not measured: {reason}.")
    measure.finish(result, arguments.json)


def run(result: Result, arguments: argparse.Namespace, n_rounds: int) -> None:
    """Measure each change in turn."""
    from runtime_adapter import Model, Session

    packaged = files("runtime_adapter") / "demo" / "tiny-llama.pte"
    with (
        as_file(packaged) as demo,
        Model.open(arguments.model or demo) as model,
        TemporaryDirectory() as folder,
        kvstore.open(Path(folder) / "sessions.db") as store,
    ):
        n = arguments.n_tokens
        words = [(7 * position + position // 13) % model.vocab_size for position in range(n)]
        changes: dict[str, Callable[[Session], object]] = {
            "regenerate the last turn": lambda session: session.regenerate(),
            f"rewind {N_GENERATED // 2} generated tokens": lambda session: session.rewind(
                to=session.n_tokens - N_GENERATED // 2
            ),
            "rewind to the middle of the prompt": lambda session: session.rewind(to=n // 2),
            "replace 10 tokens, 100 from the end": lambda session: session.replace(
                n - 100, n - 90, words[:10]
            ),
            "replace 10 tokens in the middle": lambda session: session.replace(
                n // 2, n // 2 + 10, words[:10]
            ),
            "strike 10 tokens in the middle": lambda session: session.strike(n // 2, n // 2 + 10),
        }
        table = result.table(f"{n:,} tokens of prompt, {N_GENERATED} generated", *_COLUMNS)
        for name, change in changes.items():
            took, prefill, computed = [], [], 0
            for _ in range(n_rounds):
                session = Session(model, store)
                session.append(words)
                list(session.generate(N_GENERATED))
                if name.startswith("strike"):
                    session.fork().strike(1, 2)  # the rotation is measured once a model
                    session.append(words[:1])
                began = time.perf_counter()
                changed = change(session)
                took.append(time.perf_counter() - began)
                computed = getattr(changed, "n_computed_tokens", 0)
                left = session.tokens
                model.cache.truncate(0)
                prefill.append(timed(lambda left=left: model.forward(left, start=0)))
            mine, peer = spread(took), spread(prefill)
            table.add(what=name, seconds=mine, computed=computed, prefill=peer, ratio=peer / mine)


if __name__ == "__main__":
    main()
