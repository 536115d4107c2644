"""The codecs that ``transform.py`` compares: ints of a fixed width, and transforms.

Each takes a session's cache ``[2 layers, n, heads, D]`` (K and V by turns, float32), codes all but
the first tokens, counts the bytes, and decodes them again from those bytes.
"""

from __future__ import annotations

import functools
import itertools
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard
from transform_models import Gguf, Program

N_SINK, N_CHUNK = 4, 256
TRITS = 3 ** np.arange(5, dtype=np.uint8)


@dataclass(slots=True)
class Coded:
    """A session that went through a codec: what came back, and what it took (bytes, seconds)."""

    cache: np.ndarray
    packed: float = 0.0
    stored: float = 0.0
    ideal: float = 0.0
    decode_s: float = 0.0

    def add(self, packed: float, stored: float | None = None, ideal: float | None = None) -> None:
        """Count bytes; side information is as long everywhere."""
        self.packed += packed
        self.stored += packed if stored is None else stored
        self.ideal += packed if ideal is None else ideal


def entropy_nbytes(codes: np.ndarray) -> float:
    """Bytes that an ideal coder which knows the frequencies needs for ``codes``."""
    counts = np.bincount((codes - codes.min()).ravel())
    share = counts[counts > 0] / codes.size
    return float(-(share * np.log2(share)).sum() * codes.size / 8)


def bf16_up(values: np.ndarray) -> np.ndarray:
    """Float32 rounded away from zero to what bfloat16 can hold."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def int_codec(cache: np.ndarray, *, n_bits: int) -> Coded:
    """The reference. 8: by token and head, symmetric. Else groups ``(q + z) * s``, q >= 0."""
    coded, top = Coded(cache.copy()), 2**n_bits - 1
    for index, tensor in enumerate(cache):
        rest = tensor[N_SINK:]
        coded.add(4 * tensor[:N_SINK].size)
        if n_bits == 8:
            scale = bf16_up(np.abs(rest).max(-1, keepdims=True) / 127)
            zero, codes = np.zeros_like(scale), np.rint(rest / scale).astype(np.int32)
        else:  # V: 32 neighbours of a token's head; K: 64 tokens of a channel
            if index % 2:
                groups = rest.reshape(-1, 32)
            else:
                padded = np.pad(rest, ((0, -len(rest) % 64), (0, 0), (0, 0)), mode="edge")
                groups = padded.reshape(-1, 64, rest[0].size).swapaxes(1, 2)
            low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
            scale = np.maximum((high - low) / top, np.abs(groups).max(-1, keepdims=True) / 32767)
            scale = bf16_up(np.maximum(scale, 1e-30))
            zero = np.rint(low / scale)
            codes = np.clip(np.rint(groups / scale - zero), 0, top).astype(np.int32)
        data = codes.astype(np.uint8).ravel()
        if n_bits == 4:
            data = data[::2] | data[1::2] << 4
        squeezed = len(zstandard.ZstdCompressor(level=1).compress(data.tobytes()))
        began = time.process_time()
        if n_bits == 4:
            data = np.stack([data & 15, data >> 4], -1)
        back = (data.view(np.int8 if n_bits == 8 else np.uint8).reshape(codes.shape) + zero) * scale
        if n_bits < 8 and index % 2 == 0:
            back = back.swapaxes(1, 2).reshape(padded.shape)[: len(rest)]
        coded.cache[index, N_SINK:] = back.reshape(rest.shape)
        coded.decode_s += time.process_time() - began
        packed = codes.size * n_bits / 8
        coded.add(packed, min(packed, squeezed), entropy_nbytes(codes))
        coded.add(scale.size * (2 if n_bits == 8 else 4))
    return coded


def turn(keys: np.ndarray, model: Program | Gguf, first: int, sign: int) -> np.ndarray:
    """``keys`` ``[n, H, D]`` from token ``first``, turned by RoPE: on with sign 1, back with -1."""
    cos, sin = angles(model.theta, first, len(keys), keys.shape[-1] // 2)
    even, odd, turned = keys[..., model.evens], keys[..., model.odds], np.empty_like(keys)
    turned[..., model.evens] = even * cos - odd * (sign * sin)
    turned[..., model.odds] = even * (sign * sin) + odd * cos
    return turned


@functools.lru_cache(maxsize=64)
def angles(theta: float, first: int, n: int, n_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines ``[n, 1, pairs]`` of the standard frequencies."""
    positions = np.arange(first, first + n)[:, None, None]
    angle = positions * theta ** (-np.arange(n_pairs) / n_pairs)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def hadamard(size: int) -> np.ndarray:
    """Orthonormal; ``size`` is a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return matrix


def dct(size: int) -> np.ndarray:
    """Orthonormal DCT-II, a frequency a row."""
    matrix = np.cos(np.pi * np.outer(np.arange(size), np.arange(size) + 0.5) / size)
    return np.sqrt((1 + (np.arange(size) > 0)[:, None]) / size) * matrix


def squeeze(codes: np.ndarray) -> tuple[bytes, int]:
    """One class of codes by DEFLATE's Huffman alone, small ones several to a byte; and how many."""
    limit, flat = np.abs(codes).max(initial=0), codes.ravel()
    if limit <= 1:
        data, n = (np.pad(flat + 1, (0, -flat.size % 5)).reshape(-1, 5) * TRITS).sum(-1), 5
    elif limit <= 7:
        pairs = np.pad(flat + 8, (0, flat.size % 2)).reshape(-1, 2)
        data, n = pairs[:, 0] | pairs[:, 1] << 4, 2
    else:  # one code a byte, or its two bytes
        data, n = (flat, 1) if limit <= 127 else (flat.astype("<i2").view(np.uint8), 0)
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data.astype(np.uint8).tobytes()) + coder.flush(), n


def expand(blob: bytes, n: int, shape: tuple[int, int]) -> np.ndarray:
    """What ``squeeze`` took, as float32 ``shape``."""
    data = np.frombuffer(zlib.decompress(blob, -15), np.uint8)
    if n == 5:
        flat = (data[:, None] // TRITS % 3).astype(np.int8).ravel() - 1
    elif n == 2:
        flat = np.stack([data & 15, data >> 4], -1).view(np.int8).ravel() - 8
    else:
        flat = data.view(np.int8 if n else "<i2")
    return flat[: shape[0] * shape[1]].reshape(shape).astype(np.float32)


class Transform:
    """A transform codec for groups of ``n_layers`` layers (0: K and V apart, layer by layer).

    ``basis``: none, hadamard (along D), dct (64 tokens), or pca of this chunk, this session
    (both stored with it) or the model (from ``known`` sessions, not counted).
    """

    def __init__(
        self,
        basis: str,
        model: Program | Gguf,
        known: list[np.ndarray],
        *,
        unrope: bool,
        n_layers: int,
    ) -> None:
        self.basis, self.model, self.unrope = basis, model, unrope
        width = 2 * n_layers or 1
        self.groups = [range(i, i + width) for i in range(0, len(known[0]), width)]
        self.spread = [1.0] * len(known[0])
        self.spread = [
            float(np.sqrt(np.mean([self.features(one, [i]).var(0).mean() for one in known])))
            for i in range(len(known[0]))
        ]
        self.fitted = []
        if basis == "model":
            for group in self.groups:
                rows = np.concatenate([self.features(one, group) for one in known])
                self.fitted.append((rows.mean(0), principal(rows)))
        self.basis_nbytes = sum(2 * axes.size for _, axes in self.fitted)

    def features(self, cache: np.ndarray, group: Sequence[int]) -> np.ndarray:
        """``[tokens behind the sink, features]``, each tensor with a spread of about 1."""
        parts = []
        for index in group:
            part = cache[index, N_SINK:]
            if self.unrope and index % 2 == 0:
                part = turn(part, self.model, N_SINK, -1)
            parts.append(part.reshape(len(part), -1) / self.spread[index])
        return np.concatenate(parts, 1)

    def __call__(self, cache: np.ndarray, *, step: float) -> Coded:
        """Code and decode a session, chunk by chunk."""
        coded = Coded(cache.copy())
        coded.add(4 * cache[:, :N_SINK].size)
        for number, group in enumerate(self.groups):
            rows = self.features(cache, group)
            mean = axes = None
            if self.basis == "model":
                mean, axes = self.fitted[number]
            elif self.basis == "session":
                mean, axes = rows.mean(0), principal(rows)
                coded.add(2 * axes.size + 4 * mean.size)
            edges = [0, *range(N_CHUNK - N_SINK, len(rows), N_CHUNK), len(rows)]
            for first, stop in itertools.pairwise(edges):
                back = self.chunk(coded, rows[first:stop], mean, axes, step)
                began = time.process_time()
                self.put(coded.cache, group, back, first + N_SINK)
                coded.decode_s += time.process_time() - began
        return coded

    def chunk(
        self,
        coded: Coded,
        rows: np.ndarray,
        mean: np.ndarray | None,
        axes: np.ndarray | None,
        step: float,
    ) -> np.ndarray:
        """One chunk of one group, coded and decoded."""
        n_rows, along = len(rows), None
        if mean is None:  # nothing is known: the chunk carries its means, in bfloat16
            mean = bf16_up(rows.mean(0))
            coded.add(2 * mean.size)
        values = rows - mean
        if self.basis == "chunk":
            axes = principal(rows)[:, : min(rows.shape)]
            axes = axes[:, (values @ axes).std(0) > step / 2]
            coded.add(axes.size + 2 * axes.shape[1])  # as if a byte a number were enough
        elif self.basis == "hadamard":
            axes = np.kron(np.eye(rows.shape[1] // 64), hadamard(64)).astype(np.float32)
        elif self.basis == "dct":
            along = dct(64).astype(np.float32)
            values = np.pad(values, ((0, -n_rows % 64), (0, 0)), mode="edge")
            values = along @ values.reshape(-1, 64, rows.shape[1])
            values = values.reshape(len(values), -1)  # [runs, 64 * features]
        if axes is not None:
            values = values @ axes
        codes = np.clip(np.rint(values / step), -32767, 32767).astype(np.int32)
        # Components of like size share a Huffman code; which do, takes a byte each.
        size = 2 * np.log2(np.sqrt((codes.astype(np.float32) ** 2).mean(0)) + 0.1)
        coded.add(size.size if along is None else 64 + rows.shape[1])
        if along is not None:  # a byte a frequency and one a channel
            size = size.reshape(64, -1)
            size = (size.mean(0) + size.mean(1, keepdims=True) - size.mean()).ravel()
        classes = np.rint(size)
        parts = [np.flatnonzero(classes == one) for one in np.unique(classes)]
        blobs = [(squeeze(codes.T[where]), where) for where in parts]
        began = time.process_time()
        back = np.empty(codes.T.shape, np.float32)  # [components, tokens]
        for (blob, n), where in blobs:
            back[where] = expand(blob, n, (where.size, len(codes)))
        back *= np.float32(step)
        if along is not None:
            back = along.T @ back.T.reshape(len(codes), 64, -1)
            back = back.reshape(-1, rows.shape[1])[:n_rows]
        else:
            back = back.T if axes is None else back.T @ axes.T
        back = back + mean
        coded.decode_s += time.process_time() - began
        widths = np.ceil(np.log2(codes.max(0) - codes.min(0) + 1))
        coded.add(
            packed=len(codes) * widths.sum() / 8 + 2 * widths.size if along is None else np.nan,
            stored=sum(len(blob) + 4 for (blob, _), _ in blobs),
            ideal=sum(entropy_nbytes(codes[:, where]) for where in parts),
        )
        return back

    def put(self, cache: np.ndarray, group: Sequence[int], rows: np.ndarray, first: int) -> None:
        """Write decoded rows into the cache, at token ``first``."""
        for index, part in zip(group, np.split(rows, len(group), axis=1), strict=True):
            tensor = (part * self.spread[index]).reshape(len(rows), *cache.shape[2:])
            if self.unrope and index % 2 == 0:
                tensor = turn(tensor, self.model, first, 1)
            cache[index, first : first + len(rows)] = tensor


def principal(rows: np.ndarray) -> np.ndarray:
    """Principal axes of ``rows``, as columns, the largest first."""
    return np.linalg.eigh(np.cov(rows.T.astype(np.float32)))[1][:, ::-1].astype(np.float32)
