"""``kvstore bench``: what storing gains on a model, and what each codec costs its answers."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from kvstore import CodecChoice
from kvstore.errors import StorePathError
from runtime_adapter.breakeven import FirstToken, break_even_n_tokens, measure_first_token
from runtime_adapter.commands.demo import builtin_prompt, packaged
from runtime_adapter.commands.progress import working
from runtime_adapter.commands.prompt_ids import read_prompt_ids
from runtime_adapter.model import Model
from runtime_adapter.quality import (
    BOUNDS,
    CANDIDATES,
    CodecMeasure,
    cheapest,
    measure_codecs,
    split,
)

_TEXT_N_TOKENS, _CALIBRATION_N_TOKENS = 1536 + 257, 2048
"""Of the packaged text, which the packaged model was not trained on."""


@click.command("bench")
@click.option("--model", type=click.Path(path_type=Path), help="A .pte of your own.")
@click.option("--data", type=click.Path(path_type=Path), help="The .ptd with its weights.")
@click.option(
    "--prompt-ids",
    type=click.Path(path_type=Path),
    help="Token ids of a text for your model: a JSON list, or numbers between spaces or commas.",
)
@click.option(
    "--codecs",
    default=";".join(CANDIDATES),
    show_default=True,
    help="Codecs to measure, between semicolons.",
)
@click.option(
    "--auto",
    type=click.Choice(list(BOUNDS)),
    help="Name the cheapest codec whose drift is within this bound.",
)
@click.option(
    "--n-scored",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens at the end of the text that are scored.",
)
@click.option(
    "--n-generate",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens to generate and compare.",
)
@click.option(
    "--folder",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Where to make the temporary stores: on the disk that you ask about.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def bench(
    *,
    model: Path | None,
    data: Path | None,
    prompt_ids: Path | None,
    codecs: str,
    auto: str | None,
    n_scored: int,
    n_generate: int,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Measure on a model what restoring gains, and what each codec costs.

    First the time to the first token, computed and restored, by length, and from which length on
    restoring wins. Then for each codec its size, times and drift: the model answers for the
    last tokens of the text, and for tokens of its own, from the restored cache. Without --model the
    tiny model that comes with kvstore is used.
    """
    if (model is None) != (prompt_ids is None):
        raise click.UsageError("--model and --prompt-ids go together: ids belong to one vocabulary")
    if data is not None and model is None:
        raise click.UsageError("--data goes with --model")
    names = [name.strip() for name in codecs.split(";") if name.strip()]
    if not names:
        raise click.UsageError("--codecs: expected names between semicolons, found none")
    with contextlib.ExitStack() as stack:
        program = model or stack.enter_context(packaged("tiny-llama.pte"))
        place = stack.enter_context(_temporary_folder(folder))
        opened = stack.enter_context(Model.open(program, data_path=data))
        if prompt_ids is None:
            text = builtin_prompt(_TEXT_N_TOKENS + _CALIBRATION_N_TOKENS)
            ids, calibration = text[:_TEXT_N_TOKENS], text[_TEXT_N_TOKENS:]
        else:
            text, layout = read_prompt_ids(prompt_ids), opened.cache.layout
            is_needed = any(CodecChoice(name).needs_basis(layout) for name in names)
            ids, calibration = split(text, n_scored=n_scored) if is_needed else (text, [])
        with working("measuring codecs"):
            measures = measure_codecs(
                opened,
                ids,
                names,
                place,
                n_scored=n_scored,
                n_generated=n_generate,
                calibration=calibration,
            )
        chosen = None if auto is None else cheapest(measures, auto)
        codec = "exact" if chosen is None else chosen.codec
        with working("measuring the time to the first token"):
            lengths = measure_first_token(opened, ids, place / "first", codec=codec)
    warm = break_even_n_tokens(lengths, is_cold=False)
    cold = break_even_n_tokens(lengths, is_cold=True)
    if as_json:
        found = {
            "model": str(program),
            "codec": codec,
            "first_token": [asdict(one) for one in lengths],
            "break_even_n_tokens": warm,
            "cold_break_even_n_tokens": cold,
            "codecs": [
                {
                    **asdict(one),
                    "perplexity_change": one.drift.perplexity_change,
                    "is_in_sample": one.is_in_sample,
                }
                for one in measures
            ],
            "auto": None if chosen is None else {"bound": auto, "codec": chosen.codec},
        }
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(_first_token_table(lengths, codec, warm, cold))
    click.echo()
    click.echo(_codec_table(measures))
    if chosen is not None:
        click.echo(f'\ncheapest within "{auto}": {chosen.codec}')


@contextlib.contextmanager
def _temporary_folder(within: Path | None) -> Iterator[Path]:
    try:
        folder = tempfile.TemporaryDirectory(dir=within)
    except OSError as error:
        raise StorePathError(
            f"{within}: no folder can be made there ({error.strerror}); name another --folder"
        ) from error
    with folder as path:
        yield Path(path)


def _first_token_table(
    lengths: Sequence[FirstToken], codec: str, warm: int | None, cold: int | None
) -> str:
    rows = [("tokens", "computed ms", "restored ms", "gain", "from disk ms", "gain")]
    for one in lengths:
        from_disk = one.cold_restore_s
        rows.append(
            (
                str(one.n_tokens),
                f"{one.prefill_s * 1e3:.1f}",
                f"{one.restore_s * 1e3:.1f}",
                f"{one.prefill_s / one.restore_s:.1f}x",
                "-" if from_disk is None else f"{from_disk * 1e3:.1f}",
                "-" if from_disk is None else f"{one.prefill_s / from_disk:.1f}x",
            )
        )
    return "\n".join(
        [
            f"time to the first token ({codec}, medians of 3)",
            *_aligned(rows),
            f"restoring wins from {_length(warm)}, from disk from {_length(cold)}",
        ]
    )


def _codec_table(measures: Sequence[CodecMeasure]) -> str:
    rows = [
        (
            *("codec", "smaller", "save ms", "restore ms", "perplexity", "mean KL", "max KL"),
            *("mean/max logit error", "same top 1", "generated", "stored as"),
        )
    ]
    for one in measures:
        drift = one.drift
        rows.append(
            (
                one.codec,
                f"{one.raw_nbytes / one.stored_nbytes:.2f}x",
                f"{one.save_s * 1e3:.1f}",
                f"{one.restore_s * 1e3:.1f}",
                f"{drift.perplexity_change:+.3%}",
                f"{drift.mean_kl:.1e}",
                f"{drift.max_kl:.1e}",
                f"{drift.mean_logit_error:.4f} / {drift.max_logit_error:.3f}",
                f"{drift.top1:.2%}",
                f"{drift.generated_top1:.2%}",
                one.stored_as
                + (f", {one.n_fallback_blobs} exactly" * bool(one.n_fallback_blobs))
                + (f", bases {one.bases_nbytes / 1024:.0f} KiB" * bool(one.bases_nbytes)),
            )
        )
    first = measures[0]
    title = (
        f"codecs ({first.n_tokens} tokens stored, {first.drift.n_scored_tokens} more of the text "
        f"scored, {first.drift.n_generated_tokens} generated)"
    )
    return "\n".join([title, *_aligned(rows), *_of_bases(measures)])


def _of_bases(measures: Sequence[CodecMeasure]) -> list[str]:
    """What the bases were learned from, which decides what the sizes are worth."""
    n_tokens = max((one.n_calibration_tokens for one in measures), default=0)
    if n_tokens:
        return [f"bases learned from {n_tokens} other tokens of the text, kept once for a model"]
    if any(one.is_in_sample for one in measures):
        return ["bases learned from the stored tokens, for want of a longer text: others take more"]
    return []


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _length(n_tokens: int | None) -> str:
    return "no length measured" if n_tokens is None else f"{n_tokens} tokens on"
