"""What was said: token ids, where they were computed in pieces, and whose turn was when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvstore import Lineage
from kvstore.layout import UNLIMITED_N_TOKENS
from runtime_adapter.session.cuts import Cuts

if TYPE_CHECKING:
    import torch

_KEPT_N_LOGITS = 8


@dataclass(kw_only=True)
class Conversation:
    """Token ids and what belongs to them; pure data.

    ``edits`` say which of them are not as the model computes them, as far as that content is to
    be had: where it is not, the tokens are computed anew (``note_edits``).

    Invariants: ``cuts`` and the ends of ``turns`` are at most ``len(tokens)``; ``logits`` holds
    float32 ``[vocab]`` by the number of tokens before them. ``unchanged_n_tokens`` at the
    start are as they were when the follower last looked.
    """

    tokens: list[int] = field(default_factory=list)
    cuts: Cuts = field(default_factory=Cuts)
    turns: list[tuple[int, int]] = field(default_factory=list)
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    unchanged_n_tokens: int = UNLIMITED_N_TOKENS
    edits: Lineage = ()
    speaker: object = None
    """Who generates the last turn, if it may go on."""

    def forget_after(self, n_tokens: int) -> None:
        """Take away the tokens from ``n_tokens`` on."""
        self.unchanged_n_tokens = min(self.unchanged_n_tokens, n_tokens)
        del self.tokens[n_tokens:]
        self.edits = tuple(edit for edit in self.edits if edit.start < n_tokens)
        self.cuts.forget_after(n_tokens)
        self._move_turns(lambda position: min(position, n_tokens))
        self.logits = {at: logits for at, logits in self.logits.items() if at <= n_tokens}

    def note_edits(self, edits: Lineage, n_tokens: int) -> None:
        """The first ``n_tokens`` are at hand now, and have come about so."""
        differing = [one.start for one in {*self.edits} ^ {*edits} if one.start < n_tokens]
        if differing:
            self.edits = (*edits, *(one for one in self.edits if one.start >= n_tokens))
            self.logits = {at: found for at, found in self.logits.items() if at <= min(differing)}

    def replace(self, start: int, stop: int, tokens: list[int]) -> None:
        """Put ``tokens`` in place of ``[start, stop)``; turns behind it move along."""
        after = self.tokens[stop:]
        shift = len(tokens) - (stop - start)
        moved = [(first + shift, last + shift) for first, last in self.turns if first >= stop]
        self.forget_after(start)
        self.tokens += tokens + after
        self.turns += moved
        self.speaker = None

    def strike(self, start: int, stop: int) -> None:
        """Take ``[start, stop)`` out; what follows stays as computed, at other positions."""

        def moved(position: int) -> int:
            return min(position, start) if position < stop else position - (stop - start)

        n_computed = moved(self.cuts.last)
        del self.tokens[start:stop]
        self.cuts = Cuts(moved(at) for at in self.cuts.positions if at <= start or at > stop)
        if n_computed - 1 > start:
            self.cuts.add(n_computed - 1)  # the logits need one token again, not a whole piece
        self._move_turns(moved)
        self.logits = {at: logits for at, logits in self.logits.items() if at <= start}
        self.unchanged_n_tokens = min(self.unchanged_n_tokens, start)

    def add_generated(self, token: int, *, speaker: object) -> None:
        """One more token of the turn that ``speaker`` generates."""
        start = len(self.tokens)
        self.tokens.append(token)
        if self.speaker is speaker and self.turns and self.turns[-1][1] == start:
            self.turns[-1] = (self.turns[-1][0], start + 1)
        else:
            self.turns.append((start, start + 1))
            self.speaker = speaker

    def _move_turns(self, moved: Callable[[int], int]) -> None:
        turns = [(moved(first), moved(last)) for first, last in self.turns]
        kept = [(first, last) for first, last in turns if first < last]
        if kept[-1:] != turns[-1:]:
            self.speaker = None  # the turn that was under way is gone
        self.turns = kept

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
            edits=self.edits,
        )
