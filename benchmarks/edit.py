"""What changing a conversation costs, against computing the result from the start.

    python benchmarks/edit.py [--model my.pte --n-tokens 1500]

The peer of every row is a whole prefill of the tokens that are left, by the same program in the
same run. The demo's model by default.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

import kvstore
from runtime_adapter import Model, Session

N_REPEATS = 5
N_GENERATED = 32


def main() -> None:
    """Print one line a change: seconds, tokens computed, and the ratio to a prefill."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--n-tokens", type=int, default=1500)
    arguments = parser.parse_args()
    packaged = files("runtime_adapter") / "demo" / "tiny-llama.pte"
    with (
        as_file(packaged) as demo,
        Model.open(arguments.model or demo) as model,
        tempfile.TemporaryDirectory() as folder,
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
        print(f"{n} tokens of prompt, {N_GENERATED} generated; medians of {N_REPEATS}")
        print(f"{'change':36} {'ms':>8} {'computed':>9} {'prefill ms':>11} {'ratio':>7}")
        for name, change in changes.items():
            took, prefill, computed = [], [], 0
            for _ in range(N_REPEATS):
                session = Session(model, store)
                session.append(words)
                list(session.generate(N_GENERATED))
                if name.startswith("strike"):
                    session.fork().strike(1, 2)  # the rotation is measured once a model
                    session.append(words[:1])
                began = time.perf_counter()
                result = change(session)
                took.append(time.perf_counter() - began)
                computed = getattr(result, "n_computed_tokens", 0)
                left = session.tokens
                model.cache.truncate(0)
                began = time.perf_counter()
                model.forward(left, start=0)
                prefill.append(time.perf_counter() - began)
            mine, peer = statistics.median(took), statistics.median(prefill)
            print(
                f"{name:36} {mine * 1e3:8.1f} {computed:9} {peer * 1e3:11.1f} {peer / mine:6.1f}x"
            )


if __name__ == "__main__":
    main()
