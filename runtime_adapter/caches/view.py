"""One tensor of a live cache, token by token whatever its layout; and a layer's, by role."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kvstore import TensorSpec
from kvstore.errors import InputError

if TYPE_CHECKING:
    import torch

    from runtime_adapter.caches.live import LiveTensors


class TensorView:
    """A live view: it always shows what the cache holds now, and refuses once it is closed."""

    __slots__ = ("_cache", "_spec")

    def __init__(self, cache: LiveTensors, spec: TensorSpec) -> None:
        """The tensor ``spec`` of ``cache``."""
        self._cache = cache
        self._spec = spec

    @property
    def spec(self) -> TensorSpec:
        """Name, role, layer, kind and token axis."""
        return self._spec

    @property
    def shape(self) -> tuple[int, ...]:
        """The planned shape, for example ``[1, S, H_kv, D]``."""
        return self._spec.shape

    @property
    def dtype(self) -> torch.dtype:
        """The element type."""
        return self.tensor.dtype

    @property
    def valid(self) -> tuple[tuple[int, int], ...]:
        """The positions ``(start, stop)`` whose content is here now, in ascending order.

        One range from 0 for a full tensor; the sink and the window for a ring; the last position
        alone for recurrent state; none for a ring's bookkeeping.
        """
        self._cache.check_open()
        return tuple(self._spec.kind.rules.resident(self._spec, self._cache.held))

    @property
    def tensor(self) -> torch.Tensor:
        """The whole live tensor, zero-copy, in its planned shape.

        It stays readable after the cache is closed. Writing into it changes the next step, unseen
        by the cache: use ``set``, or call ``cache.mark_edited`` before.

        Raises:
            ClosedModelError: the model was closed.
        """
        return self._cache.live(self._spec.name)

    def get(self, start: int, stop: int) -> torch.Tensor:
        """A copy of positions ``[start, stop)``, ``[n, H_kv, D]`` whatever the layout.

        Recurrent state has the one position ``n_tokens - 1``, and gives ``[1, *shape]``.

        Raises:
            ClosedModelError: the model was closed.
            InputError: not all of these positions are ``valid``.
        """
        import torch

        slots = self._slots(start, stop)
        if self._spec.token_axis is None:
            return self.tensor.clone()[None]
        index = torch.tensor(slots, dtype=torch.int64)
        return self._by_token(self.tensor).index_select(0, index)

    def set(self, start: int, values: Any) -> None:
        """Overwrite positions ``[start, start + len(values))``; see ``cache.mark_edited``.

        ``values`` are as ``get`` returns them.

        Raises:
            ClosedModelError: the model was closed.
            InputError: not all of these positions are ``valid``, or shape or dtype differ.
        """
        live = self.tensor
        by_token = live[None] if self._spec.token_axis is None else self._by_token(live)
        expected = (list(by_token.shape[1:]), live.dtype)
        if not hasattr(values, "detach"):
            raise InputError(
                f"{self._spec.name}: expected a torch.Tensor, found {type(values).__name__}"
            )
        if not values.ndim or (list(values.shape[1:]), values.dtype) != expected:
            raise InputError(
                f"{self._spec.name}: expected {expected[1]} [n, "
                f"{', '.join(map(str, expected[0]))}], found {values.dtype} {list(values.shape)}"
            )
        self._slots(start, start + len(values))
        self._cache.mark_edited(start=start)
        self.write(start, values)

    def write(self, start: int, values: torch.Tensor) -> None:
        """As ``set``, for whoever says himself what the cache holds then.

        Raises:
            ClosedModelError, InputError: as ``set``.
        """
        import torch

        slots, live = self._slots(start, start + len(values)), self.tensor
        self._cache.wait_for_readers()
        if self._spec.token_axis is None:
            live.copy_(values[0])
        else:
            index = torch.tensor(slots, dtype=torch.int64)
            self._by_token(live).index_copy_(0, index, values.detach())

    def __repr__(self) -> str:
        spec = self._spec
        return f"<TensorView {spec.name}: {spec.kind} {spec.dtype} {list(spec.shape)}>"

    def _by_token(self, live: torch.Tensor) -> torch.Tensor:
        """``live`` with the token axis first, and without the batch axis (of size 1)."""
        axis = self._spec.token_axis or 0
        return live.movedim(axis, 0).squeeze(1) if axis else live

    def _slots(self, start: int, stop: int) -> list[int]:
        spec = self._spec
        if not {type(start), type(stop)} <= {int} or not 0 <= start < stop:
            raise InputError(
                f"{spec.name}: expected positions start < stop, found {start!r}, {stop!r}"
            )
        valid = self.valid
        if not any(first <= start and stop <= last for first, last in valid):
            told = " and ".join(f"[{first}, {last})" for first, last in valid) or "none"
            raise InputError(
                f"{spec.name}: expected positions among those that it holds now, {told}; "
                f"found [{start}, {stop})"
            )
        runs = spec.kind.rules.runs(spec, start, stop)
        return [slot for run in runs for slot in range(run.slot, run.slot + run.n_slots)]


class LayerView(Mapping[str, TensorView]):
    """A layer's tensors by role: ``layer.k``, ``layer.v``, ``layer["k_scale"]``."""

    __slots__ = ("_layer", "_views")

    def __init__(self, layer: int, views: Mapping[str, TensorView]) -> None:
        """``views`` of ``layer``, by role."""
        self._layer = layer
        self._views = dict(views)

    def __getitem__(self, role: str) -> TensorView:
        return self._views[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __getattr__(self, role: str) -> TensorView:
        if role.startswith("_"):  # also while one is copied: the slots are not set yet
            raise AttributeError(role)
        try:
            return self._views[role]
        except KeyError:
            raise AttributeError(
                f"layer {self._layer} has no tensor of role {role!r}; it has: "
                f"{', '.join(self._views)}"
            ) from None

    def __repr__(self) -> str:
        return f"<LayerView {self._layer}: {', '.join(self._views)}>"
