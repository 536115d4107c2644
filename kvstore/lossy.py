"""Lossy content: the key space of its own that it lives in, and the mark that it leaves in a cache.

A store that writes with a lossy codec keeps its chunks in a key space whose *adapter* names the
codec, so no exact look-up ever meets them. A cache that was restored from there is marked by an
edit (``kvstore.lineage``): saved exactly, it does not pass for what the model computes; saved with
the same codec again, the mark is taken off, for the key space says as much.
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


def mark_of(codec_text: str) -> bytes:
    """The digest of the edit that says: from here on restored from what this codec wrote."""
    if not codec_text:
        return b""
    text = codec_text.encode("ascii")
    return hashlib.blake2b(text, digest_size=DIGEST_NBYTES, person=_PERSON).digest()


def unmarked(lineage: Lineage, mark: bytes) -> Lineage:
    """``lineage`` without these marks, and without what only says "computed on top of" them."""
    if not mark:
        return lineage
    kept: list[Edit] = []
    for edit in lineage:
        is_on_top = not edit.digest and not (kept and kept[-1].digest)
        if edit.digest != mark and not is_on_top:
            kept.append(edit)
    return tuple(kept)


def marked(live: Lineage, stored: Lineage, mark: bytes, *, start: int, stop: int) -> Lineage:
    """The lineage of a cache that keeps ``start`` tokens and restores those up to ``stop``.

    ``live`` is that of the cache before, ``stored`` that of what is restored.
    """
    if not mark or start >= stop:
        return before(stored if not mark else live, stop)
    restored = [edit for edit in stored if start <= edit.start < stop]
    if restored and restored[0].start == start:
        # One edit at a position: this one stands for both, and is not taken off again.
        both = hashlib.blake2b(mark + restored.pop(0).digest, digest_size=DIGEST_NBYTES)
        mark = both.digest()
    return (*before(live, start), Edit(start, mark), *restored)
