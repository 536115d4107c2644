"""Which codec each tensor is written with: one name for all, or a mix by role and layer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from kvstore.codec.basis import MAX_N_CHANNELS
from kvstore.codec.block import block_of, may_lose
from kvstore.codec.integers import MAX_GROUP_SIZE
from kvstore.errors import InputError
from kvstore.layout import Layout, TensorSpec

EXACT, RAW = "exact", "raw"
LOSSY = ("half", "int8", "int8-channel", "int4", "pca")
NEED_BASIS = ("pca",)
"""Those that need a basis of the tensor: ``kvstore.codec.basis``."""

NAMES = (EXACT, RAW, *LOSSY)
"""What a store can be told to write with, alone or in a mix."""

_MIN_GROUP_SIZE = 8
"""With fewer numbers to a scale the scales take more than is saved."""

_RULE = re.compile(
    r"(?:(?P<first>\d{1,6})(?:-(?P<last>\d{1,6}))?)?(?:(?:^|(?<=\d)\.)(?P<role>[kv]))?=(?P<name>.*)",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    name: str
    role: str | None = None
    layers: range | None = None

    def covers(self, spec: TensorSpec) -> bool:
        return self.role in (None, spec.role) and (self.layers is None or spec.layer in self.layers)


@dataclass(frozen=True, slots=True)
class CodecChoice:
    """A codec's name, or rules such as ``0-1=exact,k=int8,v=int4``, of which the first counts.

    A rule is for a role (``k`` or ``v``), for a layer or several (``4``, ``0-1``, the last
    included), or both (``0-1.k``). What no rule covers is exact.

    Raises:
        InputError: it is no name, and no rules.
    """

    text: str

    def __post_init__(self) -> None:
        _rules(self.text)

    def names(self, layout: Layout) -> tuple[str, ...]:
        """Each tensor's codec; never a lossy one where a tensor may not lose, or would not gain."""
        rules = _rules(self.text)
        return tuple(
            _name(spec, next((rule.name for rule in rules if rule.covers(spec)), EXACT))
            for spec in layout.tensors
        )

    def needs_basis(self, layout: Layout) -> bool:
        """Whether some tensor's codec has to learn a basis first."""
        return any(name in NEED_BASIS for name in self.names(layout))


def lossy_text(names: tuple[str, ...], layout: Layout) -> str:
    """The shortest choice that gives the lossy ones of ``names``; empty if there are none.

    It is part of what decides the content of a key space, so equal names give equal text.
    """
    found = [
        (spec, name if name in LOSSY else EXACT)
        for spec, name in zip(layout.tensors, names, strict=True)
        if may_lose(spec)
    ]
    different = {name for _, name in found}
    if different <= {EXACT}:
        return ""
    if len(different) == 1:
        return different.pop()
    rules = []
    for role in ("k", "v"):
        names_of = {spec.layer: name for spec, name in found if spec.role == role}
        runs = _runs(names_of)
        for first, last, name in runs:
            layers_text = str(first) if first == last else f"{first}-{last}"
            where = role if len(runs) == 1 else f"{layers_text}.{role}"
            rules.append(f"{where}={name}")
    return ",".join(rules)


def _runs(names_of: dict[int, str]) -> list[tuple[int, int, str]]:
    """Layers in a row with one name: the first, the last, and that name."""
    runs: list[tuple[int, int, str]] = []
    for layer, name in sorted(names_of.items()):
        if runs and runs[-1][2] == name:
            runs[-1] = (runs[-1][0], layer, name)
        else:
            runs.append((layer, layer, name))
    return runs


def _name(spec: TensorSpec, name: str) -> str:
    if name not in LOSSY:
        return name
    return name if may_lose(spec) and _fits(spec, name) else EXACT


def _fits(spec: TensorSpec, name: str) -> bool:
    """Whether the tensor's shape and dtype are ones that the lossy codec makes smaller."""
    if name == "half":
        return spec.dtype == "float32"
    block = block_of(spec, 0, 1)
    if name == "pca":
        return 2 <= block.n_channels <= MAX_N_CHANNELS
    by_channel = spec.role == "k" and name != "int8"
    if name == "int4":
        half = block.n_channels // 2
        return block.n_channels % 2 == 0 and (by_channel or math.gcd(half, 32) >= _MIN_GROUP_SIZE)
    return by_channel or _MIN_GROUP_SIZE <= block.head_dim <= MAX_GROUP_SIZE


def _rules(text: str) -> list[_Rule]:
    if not isinstance(text, str):
        raise InputError(f"codec: expected text, found {type(text).__name__}")
    if text in NAMES:
        return [_Rule(name=text)]
    rules = []
    for part in text.split(","):
        match = _RULE.fullmatch(part.strip())
        if match is None or match["name"] not in NAMES or (match["first"] or match["role"]) is None:
            raise InputError(
                f"codec: expected one of {', '.join(NAMES)}, or rules like 'k=int8,v=int4' or "
                f"'0-1=exact,k=int8', found {text!r:.80}"
            )
        layers = None
        if match["first"] is not None:
            first = int(match["first"])
            layers = range(first, int(match["last"] or first) + 1)
            if not layers:
                raise InputError(
                    f"codec: expected layers from low to high, such as 0-1, found {part!r:.80}"
                )
        rules.append(_Rule(name=match["name"], role=match["role"], layers=layers))
    return rules
