"""How long a restarted app takes to the first token of a resumed session, beside ``import torch``.

    python benchmarks/restart.py [--model my.pte]

Each round starts fresh processes: one that only imports torch, and one that imports kvstore and
the adapter, opens the program and the store, loads the session by name and computes one token.
The program was opened before, so that its analysis is remembered; files are in the page cache.
"""

from __future__ import annotations

import importlib.resources
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import program
from measure import ROOT, Column, Contender, Result, interleaved

LIMIT_SECONDS = 0.4
_COLUMNS = (
    Column("what", "from the start of the process to"),
    Column("seconds", "ms", "ms"),
    Column("more", "more than import torch, ms", "ms"),
)
_SAVE = """
import sys, kvstore
from runtime_adapter import Model
program, path, n_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
with Model.open(program) as model, kvstore.open(path) as store:
    tokens = [1 + position % (model.vocab_size - 1) for position in range(n_tokens)]
    model.forward(tokens, start=0)
    store.save_session(model.cache, tokens, name="chat")
"""
_RESUME = """
import sys, kvstore
from runtime_adapter import Model
program, path = sys.argv[1:3]
model, store = Model.open(program), kvstore.open(path)
hit = store.load_session(model.cache, name="chat")
logits = model.forward(hit.tokens[hit.n_tokens:], start=hit.n_tokens)
print(int(logits.argmax()), flush=True)
"""
_IMPORT = "import torch; print(torch.__version__, flush=True)"


def main() -> None:
    """One table: the peer, and a resumed session of a small and of a larger program."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--n-tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    n_rounds = arguments.rounds or (3 if arguments.quick else 11)
    measure.confine()
    result = Result(
        name="restart",
        question="How long does a restarted app take to the first token of a resumed session?",
        method=(
            "From the start of a Python process to the first token, seen from outside: imports, "
            f"opening program and store, restoring {arguments.n_tokens:,} tokens by the session's "
            f"name, one step. {n_rounds} interleaved rounds; the program was opened before."
        ),
    )
    reason = program.unavailable()
    if reason is not None:
        result.notes.append(f"Not measured: {reason}.")
        measure.finish(result, arguments.json)
        return
    packaged = importlib.resources.files("runtime_adapter") / "demo" / "tiny-llama.pte"
    with (
        importlib.resources.as_file(packaged) as demo,
        TemporaryDirectory(dir=measure.scratch()) as folder,
    ):
        programs = [arguments.model] if arguments.model else [Path(demo), program.path()]
        contenders = {"import torch": Contender(run=lambda: first_line(_IMPORT))}
        for path in programs:
            store = str(Path(folder) / f"{path.stem}.db")
            subprocess.run(
                [sys.executable, "-c", _SAVE, str(path), store, str(arguments.n_tokens)],
                env=_environment(),
                stderr=subprocess.DEVNULL,
                check=True,
            )
            contenders[f"the first token, {path.stem}"] = _resuming(path, store)
        took = interleaved(contenders, n_rounds=n_rounds)
    torch_s = took["import torch"].median
    table = result.table("restart", *_COLUMNS)
    for what, seconds in took.items():
        more = None if what == "import torch" else seconds.median - torch_s
        table.add(what=what, seconds=seconds, more=more)
        if more is not None:
            result.target(
                f"{what}: at most 0.4 s more than import torch",
                LIMIT_SECONDS / max(more, 1e-9),
                1.0,
                found=f"{more:.2f} s more",
            )
    measure.finish(result, arguments.json)


def first_line(source: str, *arguments: str) -> str:
    """The first line that a fresh process prints; it is stopped then."""
    command = [sys.executable, "-c", source, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(),
        text=True,
    ) as process:
        line = process.stdout.readline() if process.stdout else ""
        process.kill()
    if not line:
        raise SystemExit(f"expected a line from a fresh process, found none: {command[:2]}")
    return line


def _resuming(path: Path, store: str) -> Contender:
    return Contender(run=lambda: first_line(_RESUME, str(path), store))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
