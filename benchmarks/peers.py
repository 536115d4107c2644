"""What others do with a KV cache of the same shape: save all of it, read all of it back.

A peer that is not installed is skipped, with its reason in ``not_installed``. Each is used as it
is meant to be: llama.cpp and mlx-lm restore into caches of their own, the rest (flat file,
safetensors, ``torch.save``) into the same memory that kvstore restores into. None checks its
bytes, compresses, or syncs; where a save is to be durable, ``benchmarks/save.py`` adds the sync.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from measure import CACHE, version
from synthetic import SyntheticCache

LLAMA = "llama.cpp"
_PACKAGES = {
    LLAMA: ("llama_cpp", "gguf"),
    "flat file": (),
    "safetensors": ("safetensors",),
    "torch.save": ("torch",),
    "mlx-lm": ("mlx", "mlx_lm"),
}
NAMES = tuple(_PACKAGES)


class Peer(Protocol):
    """One way to keep a cache of ``n_tokens`` in a file."""

    def save(self, path: Path) -> None:
        """Write all of it; nothing is synced."""

    def restore(self, path: Path) -> None:
        """Read all of it back into live memory."""

    def close(self) -> None:
        """Let go of what it holds."""


def not_installed(name: str) -> str | None:
    """Why a peer cannot run here, or None."""
    for package in _PACKAGES[name]:
        try:
            importlib.import_module(package)
        except Exception as error:  # noqa: BLE001  # a build that does not load raises anything
            return f"{package} is not installed ({type(error).__name__})"
    return None


def make(name: str, cache: SyntheticCache, *, n_tokens: int, dtype: str) -> Peer:
    """The peer with the first ``n_tokens`` of ``cache``; llama.cpp computes its own."""
    if name == LLAMA:
        return LlamaCpp(n_tokens=n_tokens, dtype=dtype)
    return _ARRAYS[name](cache, n_tokens=n_tokens, dtype=dtype)


# ----------------------------------------------------------- arrays in files


class _Arrays:
    """The used part of a synthetic cache's memory, and as much empty memory to restore into."""

    def __init__(self, cache: SyntheticCache, *, n_tokens: int, dtype: str) -> None:
        self.dtype = dtype
        self.names = [spec.name for spec in cache.layout.tensors]
        self.sources = [
            memory[: n_tokens * spec.slot_nbytes]
            for memory, spec in zip(cache.memory, cache.layout.tensors, strict=True)
        ]
        # Written once, so that no page is new when it is first restored into.
        self.targets = [np.ones_like(source) for source in self.sources]

    def pairs(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Bytes that were saved, and that were restored, tensor by tensor."""
        return list(zip(self.sources, self.targets, strict=True))

    def close(self) -> None:
        """Let go of the memory."""
        self.sources, self.targets = [], []


class FlatFile(_Arrays):
    """One tensor behind the other, nothing else."""

    def save(self, path: Path) -> None:
        """Write the tensors."""
        with path.open("wb", buffering=0) as file:
            for source in self.sources:
                file.write(source.data)

    def restore(self, path: Path) -> None:
        """Read each tensor straight into its place."""
        with path.open("rb", buffering=0) as file:
            for target in self.targets:
                file.readinto(target.data)


class Safetensors(_Arrays):
    """One safetensors file of bytes."""

    def save(self, path: Path) -> None:
        """Write the tensors by name."""
        from safetensors.numpy import save_file

        save_file(dict(zip(self.names, self.sources, strict=True)), path)

    def restore(self, path: Path) -> None:
        """Copy each tensor out of the mapped file."""
        from safetensors import safe_open

        with safe_open(path, framework="np") as file:
            for name, target in zip(self.names, self.targets, strict=True):
                np.copyto(target, file.get_tensor(name))


class TorchSave(_Arrays):
    """``torch.save`` of a dict of tensors."""

    def save(self, path: Path) -> None:
        """Write the tensors by name."""
        import torch

        tensors = map(torch.from_numpy, self.sources)
        torch.save(dict(zip(self.names, tensors, strict=True)), path)

    def restore(self, path: Path) -> None:
        """Load the dict, then copy each tensor to its place."""
        import torch

        tensors = torch.load(path, weights_only=True)
        for name, target in zip(self.names, self.targets, strict=True):
            np.copyto(target, tensors[name].numpy())


class MlxLm:
    """mlx-lm's prompt cache, on the CPU."""

    def __init__(self, cache: SyntheticCache, *, n_tokens: int, dtype: str) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache

        mx.set_default_device(mx.cpu)
        self._mx = mx
        self._caches: list[Any] = []
        self._restored: list[Any] = []
        specs = cache.layout.tensors
        for layer in range(len(specs) // 2):
            k, v = (
                self._array(memory, spec.shape, n_tokens=n_tokens, dtype=dtype)
                for memory, spec in (
                    (cache.memory[index], specs[index]) for index in (2 * layer, 2 * layer + 1)
                )
            )
            one = KVCache()
            one.update_and_fetch(k, v)
            mx.eval(one.keys, one.values)
            self._caches.append(one)

    def save(self, path: Path) -> None:
        """``save_prompt_cache``."""
        from mlx_lm.models.cache import save_prompt_cache

        save_prompt_cache(str(path.with_suffix(".safetensors")), self._caches)
        path.with_suffix(".safetensors").replace(path)

    def restore(self, path: Path) -> None:
        """``load_prompt_cache``, and have the arrays really read."""
        from mlx_lm.models.cache import load_prompt_cache

        named = path.with_suffix(".safetensors")
        named.unlink(missing_ok=True)
        os.link(path, named)  # it goes by the file's name
        self._restored = load_prompt_cache(str(named))
        self._mx.eval([(one.keys, one.values) for one in self._restored])

    def pairs(self) -> list[tuple[bytes, bytes]]:
        """Bytes that were saved, and that were restored, tensor by tensor."""
        return [
            (
                bytes(memoryview(one.view(self._mx.uint8))),
                bytes(memoryview(two.view(self._mx.uint8))),
            )
            for saved, restored in zip(self._caches, self._restored, strict=True)
            for one, two in ((saved.keys, restored.keys), (saved.values, restored.values))
        ]

    def close(self) -> None:
        """Let go of the arrays."""
        self._caches, self._restored = [], []

    def _array(self, memory: np.ndarray, shape: Sequence[int], *, n_tokens: int, dtype: str) -> Any:
        """``[1, H, S, D]``, as mlx-lm keeps it."""
        numbers = memory.view(np.uint16 if dtype == "bfloat16" else dtype).reshape(shape)
        array = self._mx.array(np.ascontiguousarray(numbers[:, :n_tokens].transpose(0, 2, 1, 3)))
        return array.view(self._mx.bfloat16) if dtype == "bfloat16" else array


_ARRAYS: dict[str, Any] = {
    "flat file": FlatFile,
    "safetensors": Safetensors,
    "torch.save": TorchSave,
    "mlx-lm": MlxLm,
}


# ---------------------------------------------------------------- llama.cpp

_VOCAB_SIZE = 512
_EMBEDDING = 64


class LlamaCpp:
    """A llama.cpp context with a KV cache of Llama-3.2-1B's shape.

    Its model is a random one that is made here: 16 layers with 8 KV heads of 64, and little
    else; what it computed once is kept and restored. 16-bit caches are f16, llama.cpp's default,
    and flash attention is as llama.cpp chooses it (on), so that V is stored row by row. There is
    room for ``spare_n_tokens`` more.
    """

    def __init__(self, *, n_tokens: int, dtype: str, spare_n_tokens: int = 0) -> None:
        import llama_cpp

        self._api = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(_random_gguf()).encode(), parameters)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = n_tokens + spare_n_tokens
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = 2
        options.type_k = options.type_v = (
            llama_cpp.GGML_TYPE_F32 if dtype == "float32" else llama_cpp.GGML_TYPE_F16
        )
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp: expected a context, found none")
        self._tokens: list[int] = []
        kind = "f32" if dtype == "float32" else "f16"
        kept = CACHE / f"llama-{version('llama-cpp-python')}-{kind}-{n_tokens}.state"
        if kept.exists():
            self._tokens = _ids(0, n_tokens)
            self.restore(kept)
        else:
            self.extend(n_tokens)
            partial = kept.with_suffix(".partial")
            self.save(partial)
            partial.replace(kept)

    @property
    def n_tokens(self) -> int:
        """Tokens that the context holds."""
        return len(self._tokens)

    def extend(self, n_tokens: int) -> None:
        """Compute so many tokens more."""
        start = len(self._tokens)
        new = _ids(start, start + n_tokens)
        for first in range(0, n_tokens, 512):
            piece = new[first : first + 512]
            array = (self._api.llama_token * len(piece))(*piece)
            batch = self._api.llama_batch_get_one(array, len(piece))
            if self._api.llama_decode(self._context, batch) != 0:
                raise RuntimeError("llama.cpp: llama_decode failed")
        self._tokens += new

    def truncate(self, n_tokens: int) -> None:
        """Forget the tokens from ``n_tokens`` on."""
        memory = self._api.llama_get_memory(self._context)
        self._api.llama_memory_seq_rm(memory, 0, n_tokens, -1)
        del self._tokens[n_tokens:]

    def save(self, path: Path) -> None:
        """``llama_state_seq_save_file``."""
        tokens = (self._api.llama_token * len(self._tokens))(*self._tokens)
        if not self._api.llama_state_seq_save_file(
            self._context, str(path).encode(), 0, tokens, len(self._tokens)
        ):
            raise RuntimeError("llama.cpp: the state could not be saved")

    def restore(self, path: Path) -> None:
        """``llama_state_seq_load_file`` into the same context.

        It is a little faster than ``llama_state_load_file``, which clears the context first.
        """
        room = len(self._tokens)
        tokens, found = (self._api.llama_token * room)(), ctypes.c_size_t(0)
        if (
            not self._api.llama_state_seq_load_file(
                self._context, str(path).encode(), 0, tokens, room, ctypes.byref(found)
            )
            or found.value != room
        ):
            raise RuntimeError(f"llama.cpp: restored {found.value} of {room} tokens")

    def close(self) -> None:
        """Free the context and the model."""
        if self._context:
            self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)
            self._context = None


def _ids(start: int, stop: int) -> list[int]:
    return [(7 * position) % _VOCAB_SIZE for position in range(start, stop)]


def _random_gguf() -> Path:
    """A random model of arch "llama" whose cache has Llama-3.2-1B's shape; made once."""
    path = CACHE / f"random-llama-{version('gguf')}.gguf"
    if path.exists():
        return path
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    n_heads, head_dim, n_layers = 8, 64, 16
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_context_length(32_768)
    writer.add_embedding_length(_EMBEDDING)
    writer.add_block_count(n_layers)
    writer.add_feed_forward_length(_EMBEDDING)
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(n_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCAB_SIZE)
    writer.add_tokenizer_model("no_vocab")
    generator = np.random.default_rng(0)

    def matrix(name: str, n_out: int, n_in: int) -> None:
        values = generator.standard_normal((n_out, n_in), dtype=np.float32) / n_in**0.5
        writer.add_tensor(f"{name}.weight", values)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(_EMBEDDING, np.float32))

    matrix("token_embd", _VOCAB_SIZE, _EMBEDDING)
    matrix("output", _VOCAB_SIZE, _EMBEDDING)
    norm("output_norm")
    for layer in range(n_layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for name in ("attn_q", "attn_k", "attn_v"):
            matrix(f"{block}.{name}", n_heads * head_dim, _EMBEDDING)
        matrix(f"{block}.attn_output", _EMBEDDING, n_heads * head_dim)
        for name in ("ffn_gate", "ffn_up", "ffn_down"):
            matrix(f"{block}.{name}", _EMBEDDING, _EMBEDDING)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path
