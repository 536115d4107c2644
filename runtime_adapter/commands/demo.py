"""``kvstore demo``: a conversation that survives its process, on a real program, with timings."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import click

from kvstore import errors
from kvstore.errors import CapacityError, InputError, KVStoreError, ProgramError, TokensError
from runtime_adapter.commands.demo_report import DemoResult, Run, report
from runtime_adapter.commands.prompt_ids import read_prompt_ids

PROMPT_N_TOKENS = 1500
DEFAULT_N_GENERATE = 96
_BEGIN_TOKEN = 256

# The child imports from exactly where this process does, wherever that is.
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from runtime_adapter.commands.demo_process import main; sys.exit(main())"
)


@click.command("demo")
@click.option("--model", type=click.Path(path_type=Path), help="A .pte of your own.")
@click.option("--data", type=click.Path(path_type=Path), help="The .ptd with its weights.")
@click.option(
    "--prompt-ids",
    type=click.Path(path_type=Path),
    help="Token ids for your model: a JSON list, or numbers between spaces or commas.",
)
@click.option("--db", type=click.Path(path_type=Path), help="Store to use and keep.")
@click.option(
    "--n-generate",
    type=click.IntRange(min=2),
    default=DEFAULT_N_GENERATE,
    show_default=True,
    help="Tokens to generate; saved after half of them.",
)
@click.option("--keep", is_flag=True, help="Keep the temporary store, and say where it is.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def demo(
    *,
    model: Path | None,
    data: Path | None,
    prompt_ids: Path | None,
    db: Path | None,
    n_generate: int,
    keep: bool,
    as_json: bool,
) -> None:
    """Save a conversation in one process, restore it in another, and compare.

    The first process prefills a prompt, generates, saves its KV cache, and generates
    on. The second opens the same file, restores the cache and generates on from
    there. Ends with 1 if the two continuations differ in any token, or the
    restored buffers in any byte. Without --model a tiny model that comes with
    kvstore is used: 4.9M parameters, trained on Python's standard library.
    """
    if (model is None) != (prompt_ids is None):
        raise click.UsageError("--model and --prompt-ids go together: ids belong to one vocabulary")
    if data is not None and model is None:
        raise click.UsageError("--data goes with --model")
    with contextlib.ExitStack() as stack:
        if model is None:
            program = stack.enter_context(packaged("tiny-llama.pte"))
            prompt = builtin_prompt()
        else:
            program = model
            prompt = read_prompt_ids(prompt_ids) if prompt_ids is not None else []
        store = db if db is not None else stack.enter_context(_temporary_store(keep=keep))
        result = run(
            program,
            prompt,
            data=data,
            db=store,
            n_generate=n_generate,
            is_kept=keep or db is not None,
        )
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
    else:
        click.echo(report(result, prompt=prompt, is_text=model is None))
    if result.problem is not None:
        click.get_current_context().exit(1)


def run(
    model: Path, prompt: list[int], *, data: Path | None, db: Path, n_generate: int, is_kept: bool
) -> DemoResult:
    """Run the processes one after the other and compare what they did.

    Raises:
        CapacityError: prompt and generated tokens do not fit the model's cache.
        KVStoreError: whatever a process raised.
    """
    request = {
        "model": str(model.absolute()),
        "data": None if data is None else str(data.absolute()),
        "db": str(db.absolute()),
    }
    _say("opening the model (the first time, this analyses it: about ten seconds)")
    facts = _process({**request, "step": "warm_up"})
    _check_fits(prompt, facts, n_generate=n_generate)
    n_before_save = n_generate // 2
    _say(f"process 1: {len(prompt)} tokens of prompt, then {n_generate} generated")
    cold = _process(
        {
            **request,
            "step": "first",
            "prompt": prompt,
            "n_before_save": n_before_save,
            "n_generate": n_generate,
        }
    )
    own: list[int] = cold["generated"]
    _say("process 2: restore, and generate on")
    warm = _process(
        {
            **request,
            "step": "second",
            "tokens": prompt + own[:n_before_save],
            "n_generate": n_generate - n_before_save,
        }
    )
    n_restored = warm["n_restored_tokens"]
    is_same_text = warm["generated"] == own[n_before_save:]
    is_same_bytes = n_restored == cold["n_saved_tokens"] and warm["digest"] == cold["digest"]
    return DemoResult(
        model=str(model),
        fingerprint=facts["fingerprint"],
        n_prompt_tokens=len(prompt),
        n_generated_tokens=n_generate,
        cold=_run_of(cold, n_computed=len(prompt), n_restored=0),
        restored=_run_of(
            warm, n_computed=len(prompt) + n_before_save - n_restored, n_restored=n_restored
        ),
        n_saved_tokens=cold["n_saved_tokens"],
        save_s=cold["save_s"],
        load_s=warm["load_s"],
        file_nbytes=cold["file_nbytes"],
        file_nbytes_per_token=round(cold["file_nbytes"] / cold["n_saved_tokens"], 1),
        cache_nbytes_per_token=facts["token_nbytes"],
        is_same_text=is_same_text,
        is_same_bytes=is_same_bytes,
        problem=_problem(cold, warm, own=own[n_before_save:]),
        generated=own,
        continued=warm["generated"],
        db=str(db) if is_kept else None,
    )


def builtin_prompt(n_tokens: int = PROMPT_N_TOKENS) -> list[int]:
    """The packaged prompt: 256 (begin), then the bytes of a piece of Python."""
    with packaged("prompt.txt") as path:
        return [_BEGIN_TOKEN, *path.read_bytes()[: n_tokens - 1]]


def _problem(cold: dict[str, Any], warm: dict[str, Any], *, own: list[int]) -> str | None:
    """What differs between the processes, or None."""
    saved, restored = cold["n_saved_tokens"], warm["n_restored_tokens"]
    if restored != saved:
        why = ": ".join(part for part in (warm["reason"], warm["detail"]) if part)
        return f"{restored} of {saved} saved tokens were restored ({why or 'no reason given'})"
    if warm["digest"] != cold["digest"]:
        return "the restored buffers are not byte for byte those that were saved"
    for index, (expected, found) in enumerate(zip(own, warm["generated"], strict=False)):
        if expected != found:
            return (
                f"token {index} of the continuation: process 1 wrote {expected}, "
                f"process 2 wrote {found}"
            )
    if len(own) != len(warm["generated"]):
        return f"process 1 wrote {len(own)} tokens, process 2 wrote {len(warm['generated'])}"
    return None


def _check_fits(prompt: list[int], facts: dict[str, Any], *, n_generate: int) -> None:
    capacity, vocab_size = facts["capacity_n_tokens"], facts["vocab_size"]
    if len(prompt) + n_generate > capacity:
        raise CapacityError(
            f"the model's cache has room for {capacity} tokens: {len(prompt)} of prompt and "
            f"{n_generate} to generate do not fit; use a shorter prompt or a smaller --n-generate"
        )
    for index, token in enumerate(prompt):
        if token >= vocab_size:
            raise TokensError(
                f"expected ids below the model's vocabulary size {vocab_size}, found {token} at "
                f"index {index}; were they made with this model's tokenizer?"
            )


def _process(request: dict[str, Any]) -> dict[str, Any]:
    """Run one step in a process of its own and return its answer.

    Raises:
        KVStoreError: what the process raised, as the same class.
        ProgramError: it ended without an answer.
    """
    command = [sys.executable, "-P", "-c", _BOOT, json.dumps(sys.path)]
    spawned = {**request, "spawned": time.monotonic()}
    done = subprocess.run(  # noqa: S603  our own interpreter and code
        command, input=json.dumps(spawned), capture_output=True, text=True, check=False
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        tail = "\n".join(done.stderr.splitlines()[-5:])
        raise ProgramError(
            f"{request['model']}: the demo's process for step {request['step']!r} ended with code "
            f"{done.returncode} and no answer:\n{tail}"
        ) from error
    if "error" in answer:
        kind = getattr(errors, answer["error"], KVStoreError)
        raise kind(answer["message"])
    return dict(answer)


def _run_of(answer: dict[str, Any], *, n_computed: int, n_restored: int) -> Run:
    return Run(
        n_computed_tokens=n_computed,
        n_restored_tokens=n_restored,
        first_token_s=answer["first_token_s"],
        first_token_from_start_s=answer["first_token_from_start_s"],
    )


@contextlib.contextmanager
def packaged(name: str) -> Iterator[Path]:
    """A file of the built-in demo, from the installed package."""
    source = resources.files("runtime_adapter") / "demo" / name
    if not source.is_file():
        raise InputError(
            f"the built-in demo lacks {name}: this installation is incomplete; install kvstore "
            "again, or use --model and --prompt-ids"
        )
    with resources.as_file(source) as path:
        yield path


@contextlib.contextmanager
def _temporary_store(*, keep: bool) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="kvstore-demo-"))
    try:
        yield folder / "sessions.db"
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _say(what: str) -> None:
    if sys.stderr.isatty():
        click.echo(what, err=True)
