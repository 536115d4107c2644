"""What a save costs as a conversation grows, against writing the whole session each time.

    python benchmarks/save_growth.py [--turns 24] [--turn-n-tokens 64] [--dtype bfloat16]

Needs no ExecuTorch: a cache of Llama-3.2-1B's shape in plain memory. The peer is
what llama.cpp's session files and mlx-lm's prompt caches do at every save: the
whole state goes into a new file (here: written, synced, renamed; no checksum, no
compression). Both are measured in the same run, turn by turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from synthetic import SyntheticCache, llama_1b_layout, random_ids

import kvstore


def main() -> None:
    """Print one line a turn, and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=24)
    parser.add_argument("--turn-n-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()

    n_tokens = arguments.turns * arguments.turn_n_tokens
    layout = llama_1b_layout(capacity_n_tokens=n_tokens, dtype=arguments.dtype)
    cache = SyntheticCache(layout)
    ids = random_ids(n_tokens)
    turn_nbytes = arguments.turn_n_tokens * layout.token_nbytes
    rows = []
    print(f"{layout.token_nbytes / 1024:.0f} KiB a token, {arguments.turn_n_tokens} tokens a turn")
    print("tokens   kvstore               whole file            whole / kvstore")
    print("         ms      MB written    ms      MB written    time    bytes")
    with (
        tempfile.TemporaryDirectory() as folder,
        kvstore.open(Path(folder) / "sessions.db") as store,
    ):
        for turn in range(arguments.turns):
            start = turn * arguments.turn_n_tokens
            cache.extend(ids[start : start + arguments.turn_n_tokens])
            result = store.save_session(cache, cache.tokens, name="chat")
            peer_seconds, peer_nbytes = write_whole(cache, Path(folder) / "whole.bin")
            rows.append((result.seconds, result.stored_nbytes, peer_seconds, peer_nbytes))
            seconds, nbytes = result.seconds, result.stored_nbytes
            print(
                f"{result.n_tokens:6}  {seconds * 1e3:6.1f}  {nbytes / 1e6:10.2f}  "
                f"{peer_seconds * 1e3:8.1f}  {peer_nbytes / 1e6:10.2f}  "
                f"{peer_seconds / seconds:8.1f}x  {peer_nbytes / nbytes:6.1f}x"
            )
    half = len(rows) // 2
    first, last = (statistics.median(row[0] for row in part) for part in (rows[:half], rows[half:]))
    written, whole = (sum(row[column] for row in rows) for column in (1, 3))
    print(f"\nmedian save, second half / first half of the conversation: {last / first:.2f}")
    print(f"bytes written / bytes of new K and V: {written / (turn_nbytes * len(rows)):.2f}")
    print(f"whole files wrote {whole / written:.1f} times as much")


def write_whole(cache: SyntheticCache, path: Path) -> tuple[float, int]:
    """Write all used slots into a new file, durably; returns seconds and bytes."""
    began = time.perf_counter()
    n_tokens = len(cache.tokens)
    temporary = path.with_suffix(".tmp")
    n_bytes = 0
    with temporary.open("wb") as file:
        for index, spec in enumerate(cache.layout.tensors):
            n_bytes += file.write(cache.buffer(index)[: n_tokens * spec.slot_nbytes])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return time.perf_counter() - began, n_bytes


if __name__ == "__main__":
    main()
