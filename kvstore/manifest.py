"""msgpack, wrapped once: a model's manifest and a session's application metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from kvstore.errors import CorruptStoreError, InputError, MetadataError
from kvstore.kinds import Kind
from kvstore.layout import Layout, TensorSpec

MANIFEST_FORMAT = 1
MAX_METADATA_NBYTES = 1 << 20
_MAX_DEPTH = 32
_MAX_N_ITEMS = 100_000


def pack_manifest(layout: Layout) -> bytes:
    """The canonical manifest of a model: one msgpack map, keys in ascending order."""
    tensors = [tensor.to_manifest() for tensor in layout.tensors]
    return _pack({"format": MANIFEST_FORMAT, "tensors": tensors})


def unpack_manifest(data: bytes) -> Layout:
    """The layout in a manifest.

    Raises:
        CorruptStoreError: not a manifest of format 1, or not a possible layout.
    """
    manifest = _unpack(data)
    try:
        if not isinstance(manifest, dict) or set(manifest) != {"format", "tensors"}:
            raise CorruptStoreError(
                f"manifest: expected format and tensors, found {manifest!r:.80}"
            )
        if type(manifest["format"]) is not int or manifest["format"] != MANIFEST_FORMAT:
            raise CorruptStoreError(
                f"manifest: expected format {MANIFEST_FORMAT}, found {manifest['format']!r}"
            )
        return Layout(tensors=tuple(_tensor(entry) for entry in manifest["tensors"]))
    except (TypeError, InputError, ValueError, KeyError) as error:
        raise CorruptStoreError(f"manifest: not a possible layout ({error})") from error


def pack_metadata(metadata: Mapping[str, Any] | None) -> bytes:
    """Application metadata as msgpack, keys in ascending order at every level.

    Raises:
        MetadataError: not a mapping with text keys, holds something other than
            None, bool, int, float, str, bytes, lists and mappings, is nested
            deeper than 32 levels, has more than 100,000 items in one list or mapping, or
            takes more than 1 MiB.
    """
    if metadata is not None and not isinstance(metadata, Mapping):
        raise MetadataError(f"expected a mapping, found {type(metadata).__name__}")
    try:
        packed = _pack(_plain(metadata or {}, depth=0))
    except (OverflowError, UnicodeEncodeError, ValueError) as error:
        raise MetadataError(f"metadata cannot be stored: {error}") from error
    if len(packed) > MAX_METADATA_NBYTES:
        raise MetadataError(
            f"expected at most {MAX_METADATA_NBYTES} bytes of metadata, found {len(packed)}; "
            "store a reference to it instead"
        )
    return packed


def unpack_metadata(data: bytes) -> dict[str, Any]:
    """What ``pack_metadata`` packed; sequences come back as lists.

    Raises:
        CorruptStoreError: not a msgpack map that ``pack_metadata`` could have made.
    """
    metadata = _unpack(data)
    if len(data) > MAX_METADATA_NBYTES:
        raise CorruptStoreError(
            f"session metadata: expected at most {MAX_METADATA_NBYTES} bytes, found {len(data)}"
        )
    if not isinstance(metadata, dict):
        raise CorruptStoreError("session metadata: expected a map")
    return metadata


def _tensor(entry: Any) -> TensorSpec:
    if not isinstance(entry, dict) or set(entry) not in (
        _TENSOR_TYPES.keys() - _RING_FIELDS,
        _TENSOR_TYPES.keys(),
    ):
        raise CorruptStoreError(f"manifest: not a tensor entry: {entry!r:.80}")
    for field, value in entry.items():
        if type(value) not in _TENSOR_TYPES[field]:
            raise CorruptStoreError(f"manifest: {field} is {value!r:.80}")
    if ("window_n_tokens" in entry) != bool(entry.get("window_n_tokens")):
        raise CorruptStoreError("manifest: a window of 0 tokens; only rings have the field")
    if not all(type(size) is int for size in entry["shape"]):
        raise CorruptStoreError(f"manifest: shape is {entry['shape']!r:.80}")
    return TensorSpec(**{**entry, "shape": tuple(entry["shape"]), "kind": Kind(entry["kind"])})


_TENSOR_TYPES: dict[str, tuple[type, ...]] = {
    "dtype": (str,),
    "kind": (str,),
    "layer": (int,),
    "name": (str,),
    "role": (str,),
    "shape": (list,),
    "sink_n_tokens": (int,),
    "token_axis": (int, type(None)),
    "window_n_tokens": (int,),
}

_RING_FIELDS = {"sink_n_tokens", "window_n_tokens"}


def _plain(value: Any, *, depth: int) -> Any:
    """``value`` with sorted maps and lists, or MetadataError."""
    if isinstance(value, Mapping | list | tuple):
        if depth >= _MAX_DEPTH:
            raise MetadataError(f"expected at most {_MAX_DEPTH} levels of nesting, found more")
        if len(value) > _MAX_N_ITEMS:
            raise MetadataError(
                f"expected at most {_MAX_N_ITEMS} items in one list or mapping, found {len(value)}"
            )
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise MetadataError(f"expected text keys, found {key!r}")
        return {key: _plain(value[key], depth=depth + 1) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_plain(item, depth=depth + 1) for item in value]
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise MetadataError(
        f"expected None, bool, int, float, str, bytes, list or mapping, "
        f"found {type(value).__name__}"
    )


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value, use_bin_type=True)  # str and bytes stay apart
    return packed


def _unpack(data: bytes) -> Any:
    """Decode one msgpack value; duplicate keys, extensions and trailing bytes are refused."""
    if not isinstance(data, bytes):
        raise CorruptStoreError(f"expected msgpack bytes, found {type(data).__name__}")
    try:
        value = msgpack.unpackb(
            data,
            raw=False,  # str must be UTF-8
            strict_map_key=True,  # only str and bytes keys: nothing unhashable
            object_pairs_hook=_unique_keys,  # msgpack itself keeps the last of two
            ext_hook=_no_extension,
            # msgpack bounds every length by the size of the message itself.
        )
        # The hook above never sees extension -1: msgpack makes a Timestamp of it.
        return _plain(value, depth=0)
    except (ValueError, msgpack.UnpackException, RecursionError, MetadataError) as error:
        raise CorruptStoreError(f"not a valid msgpack value: {error}") from error


def _unique_keys(pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("duplicate key in a map")
    if not all(isinstance(key, str) for key in decoded):
        raise ValueError("a map key that is not text")
    return decoded


def _no_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code}")
