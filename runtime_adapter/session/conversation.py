"""What was said: token ids, where they were computed in pieces, and whose turn was when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore.layout import UNLIMITED_N_TOKENS
from runtime_adapter.session.cuts import Cuts

if TYPE_CHECKING:
    import torch

_KEPT_N_LOGITS = 8


@dataclass(kw_only=True)
class Conversation:
    """Token ids and what belongs to them; pure data.

    Invariants: ``cuts`` and the ends of ``turns`` are at most ``len(tokens)``; ``logits`` holds
    float32 ``[vocab]`` by the number of tokens before them. ``unchanged_n_tokens`` at the
    start are as they were when the follower last looked.
    """

    tokens: list[int] = field(default_factory=list)
    cuts: Cuts = field(default_factory=Cuts)
    turns: list[tuple[int, int]] = field(default_factory=list)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    unchanged_n_tokens: int = UNLIMITED_N_TOKENS

    def forget_after(self, n_tokens: int) -> None:
        """Take away the tokens from ``n_tokens`` on."""
        self.unchanged_n_tokens = min(self.unchanged_n_tokens, n_tokens)
        del self.tokens[n_tokens:]
        self.cuts.forget_after(n_tokens)
        turns = [(start, min(stop, n_tokens)) for start, stop in self.turns]
        self.turns = [(start, stop) for start, stop in turns if start < stop]
        self.logits = {at: logits for at, logits in self.logits.items() if at <= n_tokens}

    def replace(self, start: int, stop: int, tokens: list[int]) -> None:
        """Put ``tokens`` in place of ``[start, stop)``; turns behind it move along."""
        after = self.tokens[stop:]
        shift = len(tokens) - (stop - start)
        moved = [(first + shift, last + shift) for first, last in self.turns if first >= stop]
        self.forget_after(start)
        self.tokens += tokens + after
        self.turns += moved

    def strike(self, start: int, stop: int) -> None:
        """Take ``[start, stop)`` out; what follows stays as computed, at other positions."""

        def moved(position: int) -> int:
            return min(position, start) if position < stop else position - (stop - start)

        del self.tokens[start:stop]
        positions = [at for at in self.cuts.positions if at <= start or at > stop]
        self.cuts = Cuts(map(moved, positions))
        turns = [(moved(first), moved(last)) for first, last in self.turns]
        self.turns = [(first, last) for first, last in turns if first < last]
        self.logits = {at: logits for at, logits in self.logits.items() if at <= start}
        self.unchanged_n_tokens = min(self.unchanged_n_tokens, start)

    def add_generated(self, token: int, *, turn_start: int) -> None:
        """A token of the turn that began at ``turn_start``."""
        self.tokens.append(token)
        turn = (turn_start, len(self.tokens))
        if self.turns and self.turns[-1][0] == turn_start:
            self.turns[-1] = turn
        else:
            self.turns.append(turn)

    def keep_logits(self, logits: torch.Tensor) -> None:
        """Remember the logits after all tokens, and forget the oldest ones."""
        self.logits[len(self.tokens)] = logits
        for position in sorted(self.logits)[:-_KEPT_N_LOGITS]:
            del self.logits[position]

    def copy(self) -> Conversation:
        """The same, to go on differently."""
        return Conversation(
            tokens=list(self.tokens),
            cuts=self.cuts.copy(),
            turns=list(self.turns),
            logits=dict(self.logits),
        )
