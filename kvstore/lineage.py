"""How the content of a cache came about, where it is not simply what the model computes.

The *lineage* of a token sequence is its edits, in ascending order of where they begin; none at
all if everything is exact. Content belongs together only if tokens *and* lineage are
equal: what lies behind an edit never answers a look-up without it. ``schemas/FORMAT.md``
("Extras") specifies the bytes.
"""

from __future__ import annotations

import bisect
import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kvstore.errors import InputError
from kvstore.tokens import TokenIds, common_prefix_n_tokens

DIGEST_NBYTES = 32

_EDIT = 1
_HEADER = struct.Struct("<BII")


@dataclass(frozen=True, slots=True)
class Edit:
    """From token ``start`` on, the content came about in another way than before.

    ``digest`` (32 bytes) stands for all that was done instead of computing: equal tokens behind
    equal digests have equal content. Whoever edits chooses it, as a hash or at random. An empty
    digest says that the tokens from here on were computed, on top of what was done before.
    """

    start: int
    digest: bytes

    def __post_init__(self) -> None:
        if type(self.start) is not int or not 0 <= self.start < 2**63:
            raise InputError(f"edit: expected a position as start, found {self.start!r}")
        if type(self.digest) is not bytes or len(self.digest) not in (0, DIGEST_NBYTES):
            raise InputError(f"edit: expected a digest of 0 or 32 bytes, found {self.digest!r:.80}")


Lineage: TypeAlias = tuple[Edit, ...]
"""Edits in ascending order of ``start``, at most one at a position."""


def lineage_of(edits: Iterable[Edit] | Any) -> Lineage:
    """``edits`` as a lineage.

    Raises:
        InputError: they are not edits, or not in ascending order.
    """
    try:
        lineage = tuple(edits)
    except TypeError as error:
        raise InputError(f"edits: expected a sequence, found {type(edits).__name__}") from error
    for edit in lineage:
        if not isinstance(edit, Edit):
            raise InputError(f"edits: expected kvstore.Edit, found {type(edit).__name__}")
    if any(left.start >= right.start for left, right in itertools.pairwise(lineage)):
        raise InputError("edits: expected them in ascending order, one at a position")
    return lineage


def before(lineage: Lineage, n_tokens: int) -> Lineage:
    """The lineage of the first ``n_tokens`` tokens."""
    return tuple(edit for edit in lineage if edit.start < n_tokens)


def edited(lineage: Lineage, edit: Edit) -> Lineage:
    """The lineage after ``edit``, which stands for whatever was edited behind it too."""
    return (*before(lineage, edit.start), edit)


def computed(lineage: Lineage, n_tokens: int) -> Lineage:
    """The lineage after more tokens were computed behind ``n_tokens`` that were there."""
    if not lineage or not lineage[-1].digest or lineage[-1].start >= n_tokens:
        return lineage
    return (*lineage, Edit(n_tokens, b""))


def n_common_tokens(
    ids: TokenIds,
    lineage: Lineage,
    other_ids: TokenIds,
    other_lineage: Lineage,
    *,
    start: int = 0,
) -> int:
    """How many tokens from position ``start`` on have the same ids and came about in the same way.

    Both ``ids`` begin there; edits before it are not looked at.
    """
    n_tokens = common_prefix_n_tokens(ids, other_ids)
    differing = (edit.start for edit in {*lineage} ^ {*other_lineage} if edit.start >= start)
    return min(n_tokens, min(differing, default=start + n_tokens) - start)


def pack_extras(lineage: Lineage, start: int, stop: int) -> bytes:
    """What the key of a chunk of tokens ``[start, stop)`` carries of the lineage.

    An edit is ``u8 1``, ``u32`` offset in the chunk, ``u32`` length of the digest, and that.
    """
    return b"".join(
        _HEADER.pack(_EDIT, edit.start - start, len(edit.digest)) + edit.digest
        for edit in _within(lineage, start, stop)
    )


def unpack_extras(extras: bytes, start: int, stop: int) -> Lineage:
    """The edits within a chunk of tokens ``[start, stop)``.

    Raises:
        InputError: that is not what ``pack_extras`` gives.
    """
    edits: list[Edit] = []
    position = 0
    while position < len(extras):
        header = extras[position : position + _HEADER.size]
        if len(header) < _HEADER.size:
            raise InputError("extras: the last item is cut off")
        kind, offset, nbytes = _HEADER.unpack(header)
        position += _HEADER.size
        digest = extras[position : position + nbytes]
        is_behind = not edits or edits[-1].start < start + offset
        if kind != _EDIT or len(digest) != nbytes or start + offset >= stop or not is_behind:
            raise InputError(f"extras: an item of kind {kind} and {nbytes} bytes at {offset}")
        edits.append(Edit(start + offset, digest))
        position += nbytes
    return tuple(edits)


def n_exact_tokens(lineage: Lineage, n_tokens: int) -> int:
    """How many of ``n_tokens`` tokens lie before the first edit."""
    return min(lineage[0].start, n_tokens) if lineage else n_tokens


def extras_up_to(lineage: Lineage, start: int, stop: int) -> Sequence[tuple[bytes, int]]:
    """The extras under which a chunk may lie that shares tokens from ``start`` on, up to ``stop``.

    For each, the position up to which such a chunk can have the same content: the next edit.
    """
    edits = _within(lineage, start, stop)
    ends = [*(edit.start for edit in edits), stop]
    return [
        (pack_extras(edits[:number], start, stop), end)
        for number, end in enumerate(ends)
        if end > start
    ]


def _within(lineage: Lineage, start: int, stop: int) -> Lineage:
    """The edits that begin in ``[start, stop)``; found by halving, for chunk after chunk asks."""
    first = bisect.bisect_left(lineage, start, key=_start)
    return lineage[first : bisect.bisect_left(lineage, stop, lo=first, key=_start)]


def _start(edit: Edit) -> int:
    return edit.start
