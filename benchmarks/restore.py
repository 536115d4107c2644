"""Restoring a stored prefix against computing it again, on a real ExecuTorch program.

    python benchmarks/restore.py [--model my.pte --prompt-ids ids.json] [--repeats 3]

For each length: prefill the prompt (the peer: what an app does today after a
restart), save it, load it into an emptied cache of the same method, run the last
token. The floor is one memcpy of the restored bytes, measured in the same run.
Medians over the repeats. Without --model it uses the demo's tiny Llama; the
larger the model, the larger the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import kvstore
from runtime_adapter import Model
from runtime_adapter.commands import demo

LENGTHS = (128, 256, 512, 1024, 1499, 2048)


def main() -> None:
    """Print one line a length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompt-ids", type=Path, help="a JSON list of token ids")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    program = Path(demo.__file__).parents[1] / "demo" / "tiny-llama.pte"
    prompt = demo.builtin_prompt()
    if arguments.model is not None:
        program = arguments.model
        prompt = json.loads(arguments.prompt_ids.read_text()) if arguments.prompt_ids else None
    with tempfile.TemporaryDirectory() as folder, Model.open(program) as model:
        if prompt is None:
            prompt = [1 + i % (model.vocab_size - 1) for i in range(model.capacity_n_tokens)]
        with kvstore.open(Path(folder) / "sessions.db") as store:
            print(f"{program.name}: {model.layout.token_nbytes / 1024:.1f} KiB a token")
            print("tokens  prefill ms  restore ms  of it load ms  prefill/restore  load/memcpy")
            for n_tokens in LENGTHS:
                if n_tokens < min(len(prompt), model.capacity_n_tokens):
                    print(line(model, store, prompt[:n_tokens], arguments.repeats), flush=True)


def line(model: Model, store: kvstore.Store, ids: Sequence[int], repeats: int) -> str:
    """One length: prefill, save, restore, all into the same live cache."""
    prefill, restore, load = [], [], []
    for _ in range(repeats):
        model.cache.truncate(0)
        prefill.append(timed(lambda: model.forward(ids, start=0)))
    store.save_session(model.cache, ids)
    raw_nbytes = 0
    for _ in range(repeats):
        model.cache.truncate(0)
        began = time.perf_counter()
        hit = store.load_session(model.cache, ids)
        load.append(hit.seconds)
        model.forward(ids[hit.n_tokens :], start=hit.n_tokens)
        restore.append(time.perf_counter() - began)
        raw_nbytes = hit.raw_nbytes
    source = np.ones(raw_nbytes, np.uint8)
    target = np.zeros_like(source)
    memcpy = statistics.median(timed(lambda: np.copyto(target, source)) for _ in range(5))
    prefill_s, restore_s, load_s = map(statistics.median, (prefill, restore, load))
    return (
        f"{len(ids):6}  {prefill_s * 1e3:10.1f}  {restore_s * 1e3:10.1f}  {load_s * 1e3:13.1f}  "
        f"{prefill_s / restore_s:14.1f}x  {load_s / memcpy:10.1f}x"
    )


def timed(function: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
