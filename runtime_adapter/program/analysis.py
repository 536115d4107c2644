"""All that is known about a program without running it; small enough to remember on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvstore import Kind
from kvstore.errors import (
    InputError,
)
from kvstore.layout import Fingerprint, Layout, TensorSpec
from runtime_adapter.program.signature import Signature

Metadata = Mapping[str, int | float | bool | str | None]

_JSON_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramAnalysis:
    """A program whose cache can be served.

    ``layout`` names each tensor as ``get_attribute`` must be asked for it: the program's
    own name where it has one, else the name that ``naming.write_named_copy`` gives.
    ``is_named`` says that the file itself carries all of them. ``metadata`` holds the
    results of the constant methods (``get_max_context_len`` and so on).

    Where the layout has a checkpoint tensor, its last tensor has the role ``logits``: the
    last token's logits, float32 ``[vocab]``. It is no attribute of the program;
    whoever runs the program keeps it. ``is_endless`` says that positions may go past the
    model's context (an attention sink). ``companions`` are other methods of the same weights over
    the same cache: loaded from one program object, they share its memory.
    """

    method: str
    fingerprint: Fingerprint
    layout: Layout
    signature: Signature
    operators: tuple[str, ...]
    delegates: tuple[str, ...]
    metadata: Metadata
    is_named: bool
    is_endless: bool = False
    companions: tuple[str, ...] = ()

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that the cache and the model's context have room for."""
        context = self.metadata.get("get_max_context_len")
        capacity = self.layout.capacity_n_tokens
        if self.is_endless or not isinstance(context, int) or context <= 0:
            return capacity
        return min(capacity, context)

    def to_json(self) -> dict[str, Any]:
        """The analysis as plain JSON types; ``from_json`` reads it back."""
        return {
            "version": _JSON_VERSION,
            "method": self.method,
            "fingerprint": {
                "weights": self.fingerprint.weights.hex(),
                "program": self.fingerprint.program.hex(),
                "layout": self.fingerprint.layout.hex(),
            },
            "tensors": [tensor.to_manifest() for tensor in self.layout.tensors],
            "signature": dataclasses.asdict(self.signature),
            "operators": list(self.operators),
            "delegates": list(self.delegates),
            "metadata": dict(self.metadata),
            "is_named": self.is_named,
            "is_endless": self.is_endless,
            "companions": list(self.companions),
        }

    @classmethod
    def from_json(cls, data: Any) -> ProgramAnalysis:
        """Read what ``to_json`` gave.

        Raises:
            InputError: it is something else, of another version, or contradicts itself.
        """
        try:
            if data["version"] != _JSON_VERSION:
                raise InputError(
                    f"program analysis: expected version {_JSON_VERSION}, "
                    f"found {data['version']!r}; analyse the program again"
                )
            layout = Layout(tensors=tuple(_tensor(item) for item in data["tensors"]))
            digests = {name: bytes.fromhex(text) for name, text in data["fingerprint"].items()}
            analysis = cls(
                method=str(data["method"]),
                fingerprint=Fingerprint(**digests),
                layout=layout,
                signature=Signature(**data["signature"]),
                operators=tuple(map(str, data["operators"])),
                delegates=tuple(map(str, data["delegates"])),
                metadata=dict(data["metadata"]),
                is_named=bool(data["is_named"]),
                is_endless=bool(data["is_endless"]),
                companions=tuple(map(str, data["companions"])),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(
                f"program analysis: expected what to_json wrote, found {error!r}; "
                "analyse the program again"
            ) from error
        if layout.digest != analysis.fingerprint.layout:
            raise InputError(
                "program analysis: expected a layout with the digest in its fingerprint, "
                "found another; analyse the program again"
            )
        return analysis


def _tensor(item: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(
        name=item["name"],
        role=item["role"],
        layer=item["layer"],
        kind=Kind(item["kind"]),
        dtype=item["dtype"],
        shape=tuple(item["shape"]),
        token_axis=item["token_axis"],
        window_n_tokens=item.get("window_n_tokens", 0),
        sink_n_tokens=item.get("sink_n_tokens", 0),
    )
