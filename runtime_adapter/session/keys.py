"""A layer's cached keys as numbers: float as they are, int8 through their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import UnsupportedStateError
from runtime_adapter.caches.live import LiveTensors
from runtime_adapter.caches.view import LayerView

if TYPE_CHECKING:
    import torch

_INT8_LOWEST, _INT8_HIGHEST = -128, 127


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRows:
    """Rows of one layer's keys: tensors ``[n, H_kv, D]`` or ``[n, H_kv, 1]`` by role."""

    rows: dict[str, torch.Tensor]

    def numbers(self) -> torch.Tensor:
        """The keys as float32 ``[n, H_kv, D]``."""
        keys = self.rows["k"]
        if keys.is_floating_point():
            return keys.float()
        return (keys.float() - self.rows["k_zero_point"].float()) * self.rows["k_scale"].float()

    def with_numbers(self, keys: torch.Tensor) -> KeyRows:
        """The same with other ``keys`` (float32), in the same form.

        int8 is quantized as ExecuTorch's ``choose_qparams_per_token_asymmetric`` does it, so a
        number is off by half a step at most: 1/510 of its row's range (0 included).
        """
        old = self.rows["k"]
        if old.is_floating_point():
            return KeyRows(rows={"k": keys.to(old.dtype)})
        lowest = keys.amin(-1, keepdim=True).clamp(max=0)
        highest = keys.amax(-1, keepdim=True).clamp(min=0)
        scale = ((highest - lowest) / (_INT8_HIGHEST - _INT8_LOWEST)).clamp(min=2**-23)
        zero = (_INT8_LOWEST - lowest / scale).round().clamp(_INT8_LOWEST, _INT8_HIGHEST)
        quantized = (keys / scale + zero).round().clamp(_INT8_LOWEST, _INT8_HIGHEST)
        rows = {"k": quantized, "k_scale": scale, "k_zero_point": zero}
        return KeyRows(rows={role: rows[role].to(self.rows[role].dtype) for role in rows})


def key_roles(layer: LayerView) -> tuple[str, ...]:
    """The roles that make up a layer's keys; none if it has no keys.

    Raises:
        UnsupportedStateError: they are packed in a way whose numbers cannot be read.
    """
    if "k" not in layer:
        return ()
    dtype = layer.k.spec.dtype
    if dtype in ("float32", "float16", "bfloat16"):
        return ("k",)
    if dtype == "int8" and {"k_scale", "k_zero_point"} <= set(layer):
        return ("k", "k_scale", "k_zero_point")
    raise UnsupportedStateError(
        f"{layer.k.spec.name}: expected keys in float, or int8 with scales and zero points, found "
        f"{dtype} whose scale is not in the cache; use replace(start, stop, []) instead"
    )


def read_keys(layer: LayerView, start: int, stop: int) -> KeyRows:
    """Copies of a layer's keys at positions ``[start, stop)``."""
    return KeyRows(rows={role: layer[role].get(start, stop) for role in key_roles(layer)})


def layers_of(cache: LiveTensors) -> dict[int, LayerView]:
    """Every layer of the cache."""
    numbers = sorted({spec.layer for spec in cache.layout.tensors})
    return {number: cache.layer(number) for number in numbers}
