"""The demo's processes: each opens the model anew, does one step, and prints one JSON object.

``warm_up`` opens the model, so that neither of the others pays for its analysis or for a
cold page cache. ``first`` prefills, generates, saves in the middle and generates on. ``second``
restores from the file and generates on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstore import TensorSpec
    from runtime_adapter import Model

SESSION = "demo"
NAMESPACE = "kvstore demo"

Request = dict[str, Any]
Answer = dict[str, Any]


def main() -> int:
    """Answer the request on stdin: a JSON object on stdout, also for an error of ours."""
    from kvstore.errors import KVStoreError

    request = json.load(sys.stdin)
    # Whatever a library prints goes to stderr: stdout is for the answer alone.
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    try:
        answer = STEPS[request["step"]](request)
    except KVStoreError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    with answers:
        json.dump(answer, answers)
    return 0


def warm_up(request: Request) -> Answer:
    """Open the model and compute one token: facts about it."""
    import kvstore  # noqa: F401  the other steps need it: have its files in memory too

    with _open(request) as model:
        model.forward([0], start=0)
        return {
            "capacity_n_tokens": model.capacity_n_tokens,
            "vocab_size": model.vocab_size,
            "token_nbytes": model.layout.token_nbytes,
            "fingerprint": str(model.fingerprint),
            "named_copy": None if model.named_copy is None else str(model.named_copy),
        }


def first(request: Request) -> Answer:
    """Prefill, generate the first half, save, generate the second half."""
    import kvstore

    prompt: list[int] = request["prompt"]
    with _open(request) as model:
        started = time.monotonic()
        logits = model.forward(prompt, start=0)
        generated = [int(logits.argmax())]
        first_token = time.monotonic()
        _generate(model, generated, n_tokens=request["n_before_save"])
        with kvstore.open(request["db"], namespace=NAMESPACE) as store:
            # Left by an earlier run in the same file: this one is to write its own.
            if SESSION in [session.name for session in store.sessions()]:
                store.delete_session(SESSION)
            saved = store.save_session(model.cache, model.cache.tokens, name=SESSION)
        digest = _digest(model)
        _generate(model, generated, n_tokens=request["n_generate"])
    return {
        "generated": generated,
        "n_saved_tokens": saved.n_tokens,
        "raw_nbytes": saved.raw_nbytes,
        "stored_nbytes": saved.stored_nbytes,
        "save_s": saved.seconds,
        "digest": digest,
        "file_nbytes": _file_nbytes(Path(request["db"])),
        "first_token_s": first_token - started,
        "first_token_from_start_s": first_token - request["spawned"],
    }


def second(request: Request) -> Answer:
    """Restore the longest stored prefix of the conversation and generate on."""
    import kvstore

    tokens: list[int] = request["tokens"]
    with _open(request) as model:
        started = time.monotonic()
        with kvstore.open(request["db"], namespace=NAMESPACE) as store:
            hit = store.load_session(model.cache, tokens)
        loaded = time.monotonic()
        digest = _digest(model)
        digest_s = time.monotonic() - loaded  # the demo's own work, not the restore's
        logits = model.forward(tokens[hit.n_tokens :], start=hit.n_tokens)
        generated = [int(logits.argmax())]
        first_token = time.monotonic() - digest_s
        _generate(model, generated, n_tokens=request["n_generate"])
    return {
        "generated": generated,
        "n_restored_tokens": hit.n_tokens,
        "reason": None if hit.reason is None else hit.reason.value,
        "detail": hit.detail,
        "digest": digest,
        "load_s": hit.seconds,
        "first_token_s": first_token - started,
        "first_token_from_start_s": first_token - request["spawned"],
    }


STEPS: dict[str, Callable[[Request], Answer]] = {
    "first": first,
    "second": second,
    "warm_up": warm_up,
}


def _open(request: Request) -> Model:
    from runtime_adapter import Model

    return Model.open(request["model"], data_path=request["data"])


def _generate(model: Model, generated: list[int], *, n_tokens: int) -> None:
    """Add the most likely token until ``generated`` has ``n_tokens``."""
    while len(generated) < n_tokens:
        logits = model.forward(generated[-1:], start=model.cache.n_tokens)
        generated.append(int(logits.argmax()))


def _digest(model: Model) -> str:
    """BLAKE2b over what the next step reads of every tensor of the cache."""
    import torch

    n_tokens = model.cache.n_tokens
    digest = hashlib.blake2b(digest_size=32)
    for spec in model.layout.tensors:
        read = model.cache.live(spec.name)
        if spec.token_axis is not None:
            read = read.index_select(spec.token_axis, torch.tensor(_slots(spec, n_tokens)))
        digest.update(read.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _slots(spec: TensorSpec, n_tokens: int) -> list[int]:
    """The slots that the step after ``n_tokens`` reads, in the order of their positions."""
    rules = spec.kind.rules
    runs = [
        run
        for start, stop in rules.required(spec, n_tokens)
        for run in rules.runs(spec, start, stop)
    ]
    return [slot for run in runs for slot in range(run.slot, run.slot + run.n_slots)]


def _file_nbytes(db: Path) -> int:
    """Bytes of the database with its write-ahead log, if it left one."""
    files = [db, db.with_name(db.name + "-wal")]
    return sum(file.stat().st_size for file in files if file.exists())


if __name__ == "__main__":
    sys.exit(main())
