"""Small seeded language models that no stock exporter makes, for ``tests.programs``.

Imported in the child process that exports: torch and the model code of the
executorch wheel are needed here.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

import torch
from torch import nn


def seeded(model: nn.Module, seed: int) -> nn.Module:
    """``model`` with weights that depend on ``seed`` alone."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = parameter.dim() == 1
            parameter.copy_(1 + 0.1 * noise if is_norm else noise * parameter.shape[-1] ** -0.5)
    return model.eval()


class Gemma4(nn.Module):
    """Gemma 4's text decoder: layers of two head sizes, the last ones reading earlier K and V.

    Its sliding layers keep all their keys and values, and mask those that lie behind.
    """

    def __init__(self, *, vocab_size: int, dim: int, max_context: int) -> None:
        super().__init__()
        from executorch.examples.models.gemma4.text_decoder.gemma4_config import Gemma4Config
        from executorch.examples.models.gemma4.text_decoder.gemma4_transformer import (
            Gemma4ForCausalLM,
        )

        self.config = Gemma4Config(
            hidden_size=dim,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            global_head_dim=24,
            vocab_size=vocab_size,
            intermediate_size=2 * dim,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"] * 2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=vocab_size,
            num_kv_shared_layers=2,
            max_seq_len=max_context,
            max_context_len=max_context,
        )
        self.model = Gemma4ForCausalLM(self.config)

    def forward(self, tokens: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
        found: Any = self.model(tokens, options["input_pos"])
        logits: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return logits


class TwoShapes(nn.Module):
    """Two attention layers of different shapes, with K and V of different head sizes."""

    SHAPES = ((1, 12, 20), (2, 16, 8))
    """KV heads, key size and value size of each layer."""

    def __init__(self, *, vocab_size: int, dim: int, max_context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            _Layer(dim, *shape, max_context=max_context) for shape in self.SHAPES
        )
        self.output = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + layer(hidden, options["input_pos"])
        logits: torch.Tensor = self.output(hidden[:, -1])
        return logits


class FirstStep(nn.Module):
    """An attention layer, and a buffer that only the first step writes (as cross-attention's)."""

    def __init__(self, *, vocab_size: int, dim: int, max_context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layer = _Layer(dim, 2, 16, 16, max_context=max_context)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.register_buffer("topic", torch.zeros(1, 1, dim))

    def forward(self, tokens: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.embedding(tokens)
        is_first = options["input_pos"][:1] == 0
        self.topic.copy_(torch.where(is_first, hidden.mean(dim=1, keepdim=True), self.topic))
        hidden = hidden + self.layer(hidden + self.topic, options["input_pos"])
        logits: torch.Tensor = self.output(hidden[:, -1])
        return logits


class _Layer(nn.Module):
    def __init__(
        self, dim: int, n_kv_heads: int, key_dim: int, value_dim: int, *, max_context: int
    ) -> None:
        super().__init__()
        self.shape = (n_kv_heads, key_dim, value_dim)
        self.n_heads = 2 * n_kv_heads
        self.query = nn.Linear(dim, self.n_heads * key_dim, bias=False)
        self.key = nn.Linear(dim, n_kv_heads * key_dim, bias=False)
        self.value = nn.Linear(dim, n_kv_heads * value_dim, bias=False)
        self.result = nn.Linear(self.n_heads * value_dim, dim, bias=False)
        self.register_buffer("keys", torch.zeros(1, n_kv_heads, max_context, key_dim))
        self.register_buffer("values", torch.zeros(1, n_kv_heads, max_context, value_dim))

    def remember(
        self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put ``[1, H, n, D]`` at ``positions``; all keys and values so far."""
        self.keys.index_copy_(2, positions, keys)
        self.values.index_copy_(2, positions, values)
        return self.keys, self.values

    def forward(self, hidden: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        n_kv_heads, key_dim, value_dim = self.shape
        n_tokens = hidden.shape[1]
        start = input_pos[0].item()
        torch._check_is_size(start)
        positions = torch.arange(n_tokens) + start
        query = self.query(hidden).view(1, n_tokens, self.n_heads, key_dim).transpose(1, 2)
        key = self.key(hidden).view(1, n_tokens, n_kv_heads, key_dim).transpose(1, 2)
        value = self.value(hidden).view(1, n_tokens, n_kv_heads, value_dim).transpose(1, 2)
        keys, values = self.remember(positions, key, value)
        keys, values = (part.repeat_interleave(2, dim=1) for part in (keys, values))
        slots = torch.arange(keys.shape[2])
        mask = torch.where(slots <= positions.view(-1, 1), 0.0, float("-inf"))
        weights = (query @ keys.transpose(-2, -1) * key_dim**-0.5 + mask).softmax(dim=-1)
        return self.result((weights @ values).transpose(1, 2).reshape(1, n_tokens, -1))


class TurboQuant(nn.Module):
    """One attention layer over the wheel's TurboQuant cache (packed 4-bit keys and values)."""

    def __init__(self, *, vocab_size: int, dim: int, max_context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layer = _TurboQuantLayer(dim, max_context=max_context)
        self.output = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor, options: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.embedding(tokens)
        hidden = hidden + self.layer(hidden, options["input_pos"])
        logits: torch.Tensor = self.output(hidden[:, -1])
        return logits


class _TurboQuantLayer(_Layer):
    def __init__(self, dim: int, *, max_context: int) -> None:
        turboquant = _turboquant()

        class Cache(turboquant.TurboQuantKVCache):
            """Without ``bucketize``, for which the portable runtime has no kernel."""

            def _compress(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                flat = x.reshape(-1, self.head_dim)
                norms = (flat * flat).sum(dim=-1, keepdim=True).sqrt()
                rotated = (flat / (norms + 1e-10)) @ self.rotation_T.float()
                above = rotated.unsqueeze(-1) > self.boundaries.float()
                indices = above.to(torch.int32).sum(dim=-1)
                packed = (indices[:, 0::2] * 16 + indices[:, 1::2]).to(torch.uint8)
                return (
                    packed.reshape(*x.shape[:-1], self.half_dim),
                    norms.reshape(*x.shape[:-1], 1).to(torch.bfloat16),
                )

            def _decompress(self, packed: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
                wide = packed.to(torch.int32)
                high = torch.div(wide, 16, rounding_mode="floor")
                indices = torch.stack([high, wide - high * 16], dim=-1)
                flat = self.centroids.float()[indices.reshape(-1, self.head_dim).long()]
                scaled = (flat @ self.rotation_T.float().T) * norms.reshape(-1, 1).float()
                return scaled.reshape(*packed.shape[:-1], self.head_dim)

        super().__init__(dim, 2, 16, 16, max_context=max_context)
        del self.keys, self.values
        self.cache = Cache(n_heads=2, head_dim=16, max_seq_len=max_context)

    def remember(
        self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``_Layer.remember``, packed in between."""
        packed = self.cache.update(positions, keys, values)
        return self.cache._decompress(*packed[:2]), self.cache._decompress(*packed[2:])


def _turboquant() -> Any:
    """The wheel's module, without its package, which imports torchtune."""
    import executorch.extension.llm

    name = "executorch.extension.llm.modules"
    package = types.ModuleType(name)
    package.__path__ = [f"{root}/modules" for root in executorch.extension.llm.__path__]
    sys.modules.setdefault(name, package)
    return importlib.import_module(f"{name}.turboquant")
