"""Lossy content: the key space of its own that it lives in, and the mark that it leaves in a cache.

A store that writes with a lossy codec keeps its chunks in a key space whose *adapter* names the
codec, so no exact look-up ever meets them. A cache that was restored from there is marked by an
edit (``kvstore.lineage``): saved exactly, it does not pass for what the model computes; saved with
a lossy codec, the mark is taken off, for the key space says as much.

Blobs there may be exact: tails, and what a codec could not hold. A cache restored from such alone
is marked too, since what they hold may have lost something before it was saved; but its mark says
that nothing was lost on this way, so that a codec may learn from it.
"""

from __future__ import annotations

import hashlib
import re
import struct

from kvstore.errors import CorruptStoreError
from kvstore.lineage import DIGEST_NBYTES, Edit, Lineage, before

_CODEC = 1
_HEADER = struct.Struct("<BI")
_TEXT = re.compile(r"[a-z0-9.,=-]+")
_PERSON = b"kvstore/lossy"
_MARK = hashlib.blake2b(b"mark", digest_size=16, person=_PERSON).digest()
_EXACT_MARK = hashlib.blake2b(b"exact mark", digest_size=16, person=_PERSON).digest()
_BOTH = hashlib.blake2b(b"both", digest_size=16, person=_PERSON).digest()
"""What the digests of our own edits begin with; no hash of anybody else's does."""


def adapter_of(codec_text: str) -> bytes:
    """What a key space's root key carries of a lossy codec; nothing for exact content.

    ``u8 1``, ``u32`` length of the text, the text in ASCII.
    """
    text = codec_text.encode("ascii")
    return _HEADER.pack(_CODEC, len(text)) + text if text else b""


def codec_text_of(adapter: bytes) -> str:
    """The lossy codec that a key space is of, or nothing.

    Raises:
        CorruptStoreError: that is not what ``adapter_of`` gives.
    """
    if adapter == b"":
        return ""
    text = ""
    try:
        text = adapter[_HEADER.size :].decode("ascii")
        is_one = _TEXT.fullmatch(text) is not None and adapter_of(text) == adapter
    except (AttributeError, TypeError, UnicodeDecodeError):
        is_one = False
    if not is_one:
        raise CorruptStoreError(f"a key space with an unknown adapter, {adapter!r:.80}")
    return text


def mark_of(codec_text: str, chunk_key: bytes, *, is_exact: bool = False) -> bytes:
    """The digest of the edit that says: from here on restored from this codec's key space.

    ``chunk_key`` is that of the last chunk that was restored from, so that marks of other content
    differ. ``is_exact``: from exact blobs alone.
    """
    return (_EXACT_MARK if is_exact else _MARK) + _digest(codec_text.encode("ascii") + chunk_key)


def unmarked(lineage: Lineage) -> Lineage:
    """``lineage`` without any such marks, and without what only says "computed on top of" them."""
    kept: list[Edit] = []
    for edit in lineage:
        is_on_top = not edit.digest and not (kept and kept[-1].digest)
        if not edit.digest.startswith((_MARK, _EXACT_MARK)) and not is_on_top:
            kept.append(edit)
    return tuple(kept)


def n_unmarked_tokens(lineage: Lineage, n_tokens: int) -> int:
    """How many of ``n_tokens`` tokens lie before the first mark of what a lossy blob held."""
    ours = (edit.start for edit in lineage if edit.digest.startswith((_MARK, _BOTH)))
    return min([n_tokens, *ours])


def marked(live: Lineage, stored: Lineage, mark: bytes, *, start: int, stop: int) -> Lineage:
    """The lineage of a cache that keeps ``start`` tokens and restores those up to ``stop``.

    ``live`` is that of the cache before, ``stored`` that of what is restored. Where an edit lies
    at ``start`` the mark is put before it, since there is one edit at a position: over tokens
    that would need none.
    """
    kept = before(live, start)
    restored = [edit for edit in stored if start <= edit.start < stop]
    taken = {edit.start for edit in (*kept, *restored)}
    position = next((at for at in range(start, -1, -1) if at not in taken), None)
    if position is not None:
        lineage = [*kept, Edit(position, mark), *restored]
        return tuple(sorted(lineage, key=_start))
    first, *others = restored  # every position up to here is edited: one edit stands for both
    if not first.digest.startswith(_BOTH):
        first = Edit(first.start, _BOTH + _digest(mark + first.digest))
    return (*kept, first, *others)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_NBYTES - len(_MARK), person=_PERSON).digest()


def _start(edit: Edit) -> int:
    return edit.start
