"""What each codec makes of a cache of Llama-3.2-1B's shape: size, save, restore.

    python benchmarks/codecs.py [--n-tokens 2048] [--repeats 5] [--dtypes bfloat16 float32]

Needs no ExecuTorch: normally distributed numbers in plain memory (a trained model's compress a
few percent better). Peers, interleaved with it in the same run: a flat file that is read into the
same memory, which is what llama.cpp's session files are (no checksum), and one memcpy. Files are
in the page cache; restores verify every checksum. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from synthetic import SyntheticCache, llama_1b_layout, random_ids

import kvstore
from kvstore import codec


def main() -> None:
    """Print one line for each dtype and codec."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()

    print(
        "dtype     codec   MB    ratio  save ms  restore ms   GB/s  flat ms  flat/restore  memcpy"
    )
    for dtype in arguments.dtypes:
        for name in codec.NAMES:
            print(line(dtype, name, arguments.n_tokens, arguments.repeats), flush=True)


def line(dtype: str, name: str, n_tokens: int, repeats: int) -> str:
    """One dtype and codec: save once, then restore and read the flat file by turns."""
    layout = llama_1b_layout(capacity_n_tokens=n_tokens, dtype=dtype)
    cache, ids = SyntheticCache(layout), random_ids(n_tokens)
    cache.extend(ids)
    target = SyntheticCache(layout, fill=False)
    restores, flats, copies = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        flat = Path(folder) / "flat.bin"
        flat.write_bytes(b"".join(memory.tobytes() for memory in cache.memory))
        with kvstore.open(Path(folder) / "sessions.db", codec=name) as store:
            saved = store.save_session(cache, ids)
            for _ in range(repeats):
                target.truncate(0)
                hit = store.load_session(target, [*ids, 0])
                if hit.n_tokens != n_tokens:
                    raise SystemExit(f"restored {hit.n_tokens} of {n_tokens} tokens: {hit.detail}")
                restores.append(hit.seconds)
                flats.append(timed(lambda: read_flat(flat, target)))
                copies.append(timed(lambda: copy_all(cache, target)))
    restore_s, flat_s, copy_s = map(statistics.median, (restores, flats, copies))
    return (
        f"{dtype:9} {name:6} {saved.stored_nbytes / 1e6:5.0f}  "
        f"{saved.raw_nbytes / saved.stored_nbytes:5.2f}  {saved.seconds * 1e3:7.0f}  "
        f"{restore_s * 1e3:10.1f}  {saved.raw_nbytes / restore_s / 1e9:5.2f}  "
        f"{flat_s * 1e3:7.1f}  {flat_s / restore_s:11.2f}x  {copy_s / restore_s:5.2f}x"
    )


def read_flat(path: Path, cache: SyntheticCache) -> None:
    """Read the file into the cache's memory."""
    with path.open("rb", buffering=0) as file:
        for memory in cache.memory:
            file.readinto(memory.data)


def copy_all(source: SyntheticCache, target: SyntheticCache) -> None:
    """The floor: one pass over the bytes."""
    for one, other in zip(source.memory, target.memory, strict=True):
        np.copyto(other, one)


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
