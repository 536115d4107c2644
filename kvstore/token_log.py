"""Which tokens a live cache holds, and what its rings still have of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from kvstore.errors import CapacityError, RewindError
from kvstore.kinds import Held, kind_of
from kvstore.layout import Layout
from kvstore.lineage import Edit, Lineage, before, computed, edited


class TokenLog:
    """The book that every ``LiveCache`` keeps.

    Invariants: ``held.n_tokens == len(tokens) <= layout.capacity_n_tokens``;
    ``held.peak_n_tokens >= held.n_tokens``. It touches no buffer.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._tokens = array("Q")
        self._peak_n_tokens = 0
        self._restored_n_tokens = 0
        self._edits: Lineage = ()

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids, position 0 first."""
        return self._tokens

    @property
    def held(self) -> Held:
        """How the cache came to hold them."""
        return Held(
            n_tokens=len(self._tokens),
            peak_n_tokens=self._peak_n_tokens,
            restored_n_tokens=self._restored_n_tokens,
        )

    @property
    def edits(self) -> Lineage:
        """Where the content is not what the model computes for the tokens."""
        return self._edits

    def check_truncate(self, n_tokens: int) -> None:
        """Refuse a length that the buffers could not stand for.

        Raises:
            RewindError: see ``LiveCache.truncate``.
            CapacityError: negative, or more than the cache holds.
        """
        if not 0 <= n_tokens <= len(self._tokens):
            raise CapacityError(
                f"truncate: expected a length from 0 to {len(self._tokens)}, the number of tokens "
                f"that the cache holds, found {n_tokens}"
            )
        if n_tokens == 0:
            return
        held = self.held
        for spec in self._layout.tensors:
            if not kind_of(spec).can_truncate(spec, held, n_tokens):
                raise RewindError(
                    f"{spec.name} is a {spec.kind} tensor and cannot go back from "
                    f"{held.n_tokens} to {n_tokens} tokens; load_session can, if that was saved "
                    "while it was resident, or truncate(0) and compute again"
                )

    def truncate(self, n_tokens: int) -> None:
        """Forget the tokens from ``n_tokens`` on.

        Raises:
            RewindError, CapacityError: see ``check_truncate``.
        """
        self.check_truncate(n_tokens)
        del self._tokens[n_tokens:]
        self._edits = before(self._edits, n_tokens)
        sinks = [spec.sink_n_tokens for spec in self._layout.tensors if spec.window_n_tokens]
        if n_tokens <= min(sinks, default=0):
            # Behind the sink the rings hold nothing now, so they fill up anew.
            self._peak_n_tokens, self._restored_n_tokens = n_tokens, 0

    def extend(self, tokens: Sequence[int]) -> None:
        """The model computed ``tokens`` behind the last one."""
        if tokens:
            self._edits = computed(self._edits, len(self._tokens))
        self._tokens.extend(tokens)
        self._peak_n_tokens = max(self._peak_n_tokens, len(self._tokens))

    def edit(self, edit: Edit) -> None:
        """From ``edit.start`` on the buffers hold something else now, tokens or not."""
        self._edits = edited(self._edits, edit)

    def restore(self, tokens: Sequence[int], held: Held, edits: Lineage) -> None:
        """The buffers are as they were, or as if they had been when the log said this."""
        self._tokens = array("Q", tokens)
        self._edits = edits
        self._peak_n_tokens = held.peak_n_tokens
        self._restored_n_tokens = held.restored_n_tokens

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """A load put in place what ``tokens`` require."""
        self._edits = edits
        self._tokens = array("Q", tokens)
        self._peak_n_tokens = self._restored_n_tokens = len(self._tokens)
