"""What the demo found, and how people read it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one process did. Times are seconds to the first token that it produced."""

    n_computed_tokens: int
    n_restored_tokens: int
    first_token_s: float
    first_token_from_start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The two processes side by side; ``--json`` prints exactly these fields."""

    model: str
    fingerprint: str
    n_prompt_tokens: int
    n_generated_tokens: int
    cold: Run
    restored: Run
    n_saved_tokens: int
    save_s: float
    load_s: float
    file_nbytes: int
    file_nbytes_per_token: float
    cache_nbytes_per_token: int
    is_same_text: bool
    is_same_bytes: bool
    problem: str | None
    generated: list[int]
    continued: list[int]
    db: str | None


def report(result: DemoResult, *, prompt: list[int], is_text: bool) -> str:
    """The result as people read it."""
    cold, restored = result.cold, result.restored
    rows = [
        ("", "cold", "restored", ""),
        (
            "time to first token, model open",
            _seconds(cold.first_token_s),
            _seconds(restored.first_token_s),
            _ratio(cold.first_token_s, restored.first_token_s),
        ),
        (
            "time to first token, process start",
            _seconds(cold.first_token_from_start_s),
            _seconds(restored.first_token_from_start_s),
            _ratio(cold.first_token_from_start_s, restored.first_token_from_start_s),
        ),
        (
            "tokens computed for it",
            f"{cold.n_computed_tokens:,}",
            f"{restored.n_computed_tokens:,}",
            "",
        ),
        ("tokens restored", f"{cold.n_restored_tokens:,}", f"{restored.n_restored_tokens:,}", ""),
    ]
    lines = [f"{a:<36}{b:>12}{c:>12}  {d}".rstrip() for a, b, c, d in rows]
    percent = 100 * result.file_nbytes_per_token / result.cache_nbytes_per_token
    lines.append("")
    lines.append(
        f"in the file: {result.file_nbytes:,} bytes for {result.n_saved_tokens:,} tokens, "
        f"{result.file_nbytes_per_token:,.0f} a token, {percent:.0f} % of the "
        f"{result.cache_nbytes_per_token:,} that a token takes in memory"
    )
    lines.append(f"save: {_seconds(result.save_s)}; load: {_seconds(result.load_s)}")
    lines.append(
        "cold computes the prompt; restored opens the store, loads, and computes what is left"
    )
    lines.append("")
    if is_text:
        n_before_save = len(result.generated) - len(result.continued)
        lines.append("prompt (its end) | process 1, before it saved | process 2:")
        lines.append(
            f"...{_text(prompt[-160:])}|{_text(result.generated[:n_before_save])}"
            f"|{_text(result.continued)}"
        )
        lines.append("")
    if result.problem is None:
        lines.append(
            f"same: process 2 wrote the {len(result.continued)} tokens that process 1 wrote "
            "after it saved, and every restored byte is the one that was saved"
        )
    else:
        lines.append(f"DIFFERENT: {result.problem}")
    if result.db is not None:
        lines.append(f"store: {result.db}")
    return "\n".join(lines)


def _text(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _ratio(cold_s: float, restored_s: float) -> str:
    ratio = cold_s / restored_s if restored_s else math.inf
    return f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
