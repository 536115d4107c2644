"""Open and run copies of a program with flipped bits, each in a process of its own.

    python -m tests.adapter.bit_flips PROGRAM FIRST_SEED N FOLDER

Prints one line a copy: the name of the error, ``ran``, or ``died`` with the signal.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from kvstore.errors import KVStoreError
from runtime_adapter import Model
from runtime_adapter.pte.file import read_header
from runtime_adapter.runtime.libraries import operator_schema

_LONGEST_SECONDS = 60


def flipped(data: bytes, n_program_bytes: int, *, seed: int) -> bytes:
    """``data`` with 1, 2 or 4 bits flipped in its program part."""
    dice = random.Random(seed)
    copy = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 4])):
        copy[dice.randrange(8, n_program_bytes)] ^= 1 << dice.randrange(8)
    return bytes(copy)


def outcome(data: bytes, folder: Path) -> str:
    """What opening and running a program comes to, found out in a child process."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(_LONGEST_SECONDS)
        path = folder / "flipped.pte"
        path.write_bytes(data)
        try:
            model = Model.open(path, cache_dir=folder / f"cache-{os.getpid()}")
            model.forward([1, 2, 3, 4], start=0)
            said = "ran"
        except KVStoreError as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return said if os.WIFEXITED(status) and said else f"died {status}"


def main() -> None:
    source, first_seed, n, folder = sys.argv[1:]
    with Path(source).open("rb") as stream:
        n_program_bytes = read_header(stream, path=Path(source)).program_nbytes
        stream.seek(0)
        data = stream.read()
    # Once for all children: what a program's analysis imports and loads.
    Model.open(source, cache_dir=Path(folder, "cache")).close()
    for operator in ("llama::update_cache.out", "quantized_decomposed::add.out"):
        operator_schema(operator)
    for seed in range(int(first_seed), int(first_seed) + int(n)):
        said = outcome(flipped(data, n_program_bytes, seed=seed), Path(folder))
        print(said, flush=True)


if __name__ == "__main__":
    main()
