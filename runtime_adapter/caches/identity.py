"""Which model a cache in the caller's hands belongs to: a digest of content, never of a name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore.errors import InputError

_DIGEST_NBYTES = 32
_PIECE_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFingerprint:
    """A ``Fingerprint`` that still lacks its layout: digests of weights and program, 32 bytes each.

    ``Model.fingerprint`` has them too, so a cache in the caller's hands can be given a
    program's identity.
    """

    weights: bytes
    program: bytes


def fingerprint_of(
    weights: Mapping[str, Any] | bytes | os.PathLike[str],
    *,
    program: str | bytes | os.PathLike[str],
) -> ModelFingerprint:
    """The fingerprint of a model by its content.

    ``weights`` is a state dict (name to tensor, torch or NumPy), a file, or bytes. It must not
    contain the cache itself: for a module whose cache is among its buffers, pass
    ``dict(module.named_parameters())``. ``program`` is whatever else decides the numbers: a file or
    the text of the configuration (RoPE base, norms, attention), with the library's version
    if another version may compute other bits. Hashes about 1 GB a second: keep the result.

    Raises:
        InputError: there is nothing in it, a file cannot be read, or ``weights`` is a name.
    """
    return ModelFingerprint(
        weights=_digest(weights, what="weights", person=b"kvstore/weights"),
        program=_digest(program, what="program", person=b"kvstore/program"),
    )


def _digest(content: Any, *, what: str, person: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_NBYTES, person=person)
    if isinstance(content, str) and what == "program":
        content = content.encode("utf-8")
    if isinstance(content, Mapping) and not all(isinstance(name, str) for name in content):
        raise InputError(f"fingerprint_of: expected {what} under names, found {list(content)[:3]}")
    if isinstance(content, Mapping) and content:
        for name in sorted(content):
            _add_tensor(digest, name, content[name])
    elif isinstance(content, bytes) and content:
        digest.update(content)
    elif isinstance(content, os.PathLike):
        _add_file(digest, Path(content), what=what)
    else:
        found = "nothing" if hasattr(content, "__len__") and not len(content) else None
        advice = " (a name says nothing about content: pass a Path)" if content else ""
        raise InputError(
            f"fingerprint_of: expected {what} as content or as the Path of a file, "
            f"found {found or type(content).__name__ + advice}"
        )
    return digest.digest()


def _add_tensor(digest: hashlib.blake2b, name: str, tensor: Any) -> None:
    """Name, dtype, shape and bytes, each behind its length."""
    import numpy as np
    import torch

    if not isinstance(tensor, np.ndarray | torch.Tensor):
        raise InputError(
            f"fingerprint_of: expected a tensor for {name!r}, found {type(tensor).__name__}"
        )
    try:
        if isinstance(tensor, np.ndarray):
            data = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
        else:
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    except (RuntimeError, TypeError, ValueError) as error:  # quantized, sparse, on no device
        raise InputError(
            f"fingerprint_of: expected a tensor of plain numbers for {name!r}, found one without "
            f"readable bytes ({error}); pass the file that the weights came from"
        ) from error
    dtype = str(tensor.dtype).removeprefix("torch.")
    for part in (name, dtype, ",".join(str(int(size)) for size in tensor.shape)):
        text = part.encode("utf-8")
        digest.update(len(text).to_bytes(8, "little") + text)
    digest.update(data.nbytes.to_bytes(8, "little"))
    digest.update(data)


def _add_file(digest: hashlib.blake2b, path: Path, *, what: str) -> None:
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_PIECE_NBYTES):
                digest.update(piece)
    except OSError as error:
        raise InputError(
            f"fingerprint_of: expected a file with the {what} at {path}, found {error}"
        ) from error
