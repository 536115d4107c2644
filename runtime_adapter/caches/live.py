"""Live tensors as one cache: bytes for the store, tensors for people.

What ``PlannedCache`` (an ExecuTorch program's memory) and ``TensorCache`` (the caller's) have in
common.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore import Edit, Held, Lineage, TokenLog
from kvstore.errors import CapacityError, InputError, RewindError
from kvstore.layout import LOGITS_ROLE, Fingerprint, Layout
from runtime_adapter.caches.still import Still
from runtime_adapter.caches.view import LayerView, TensorView

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeCopy:
    """Every byte of a cache, and what its log said."""

    buffers: list[bytes]
    tokens: tuple[int, ...]
    held: Held
    edits: Lineage
    cuts: tuple[list[int], bool]


class LiveTensors(Mapping[str, TensorView]):
    """A ``LiveCache`` over one torch tensor for each of a layout's tensors.

    Invariants: ``len(tokens) <= capacity_n_tokens``; the tensors hold what the next step reads
    after ``tokens``, each in the way of its kind: slot ``i`` of a full one holds token
    ``i``, a ring its window, recurrent state all of them at once. Before the first
    of ``edits``, the content is exactly what the model computed or a store restored.

    As a mapping it goes from a tensor's name to a live view of it; ``layer(5).k`` is another
    way to one. ``revision`` grows with every change of what the cache holds. Not thread-safe.
    """

    __slots__ = (
        "__weakref__",
        "_capacity_n_tokens",
        "_cuts",
        "_fingerprint",
        "_initial",
        "_knows_cuts",
        "_layout",
        "_log",
        "_readers",
        "_revision",
        "_snapshot",
        "_views",
    )

    def __init__(
        self,
        *,
        layout: Layout,
        fingerprint: Fingerprint,
        views: Sequence[torch.Tensor],
        capacity_n_tokens: int | None = None,
    ) -> None:
        """Wrap ``views``, one live tensor for each of ``layout.tensors``, in that order.

        They must be as at the start of a conversation: what they hold now is what
        ``truncate(0)`` goes back to. ``capacity_n_tokens`` is the model's own limit,
        if there is one below the layout's (a ring has none by itself).

        Raises:
            InputError: a view has not the shape or dtype that the layout says, or
                ``capacity_n_tokens`` is not a length.
        """
        if len(views) != len(layout.tensors):
            raise InputError(
                f"expected {len(layout.tensors)} live tensors for the layout, found {len(views)}"
            )
        for spec, view in zip(layout.tensors, views, strict=True):
            if (tuple(view.shape), _dtype_name(view)) != (spec.shape, spec.dtype):
                raise InputError(
                    f"tensor {spec.name!r}: expected {spec.dtype} {list(spec.shape)} as the "
                    f"layout says, found {_dtype_name(view)} {list(view.shape)}"
                )
        if capacity_n_tokens is not None and (
            type(capacity_n_tokens) is not int or capacity_n_tokens < 1
        ):
            raise InputError(
                f"capacity_n_tokens: expected a whole number of at least 1, found "
                f"{capacity_n_tokens!r}"
            )
        self._layout = layout
        self._fingerprint = fingerprint
        self._views = {spec.name: view for spec, view in zip(layout.tensors, views, strict=True)}
        self._capacity_n_tokens = min(
            layout.capacity_n_tokens,
            layout.capacity_n_tokens if capacity_n_tokens is None else capacity_n_tokens,
        )
        # None stands for zeros: most states start with them, and some are large.
        self._initial = {
            spec.name: view.clone() if bool(view.any()) else None
            for spec, view in zip(layout.tensors, views, strict=True)
            if not spec.kind.rules.has_token_content
        }
        self._log = TokenLog(layout)
        self._revision = 0
        self._readers: list[Future[Any]] = []
        self._cuts: list[int] = []
        self._knows_cuts = True
        self._snapshot: tuple[int, ...] | None = ()

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model this cache belongs to."""
        return self._fingerprint

    @property
    def layout(self) -> Layout:
        """The tensors, in the order of ``buffer``'s index."""
        return self._layout

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token ids that the cache holds now, position 0 first."""
        if self._snapshot is None:  # made when asked for, so that a decode step stays O(1)
            self._snapshot = tuple(self._log.tokens)
        return self._snapshot

    @property
    def held(self) -> Held:
        """How the cache came to hold them; decides what its rings still have."""
        return self._log.held

    @property
    def n_tokens(self) -> int:
        """Number of tokens that the cache holds now."""
        return len(self._log.tokens)

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that the cache has room for."""
        return self._capacity_n_tokens

    @property
    def logits(self) -> torch.Tensor | None:
        """A copy of the last token's logits, float32 ``[vocab]``, or None if they are not held.

        A layout with recurrent state keeps them, because such a state cannot go back
        one token to compute them again. There they are held whenever the cache is not empty,
        also after a load. Other layouts never keep them.
        """
        self.check_open()
        view = self._logits_view()
        return None if view is None or not self.n_tokens else view.clone()

    @property
    def cuts(self) -> Sequence[int]:
        """Where the pieces ended in which the tokens were computed, in ascending order.

        Up to where that is known: what a load brought is not, unless ``note_cuts`` says it.
        """
        return self._cuts

    def note_cuts(self, cuts: Sequence[int]) -> None:
        """Say in which pieces the tokens were computed that the cache holds now."""
        self._cuts = list(cuts)
        self._knows_cuts = True

    @property
    def revision(self) -> int:
        """How often what the cache holds was changed: equal numbers, equal content."""
        return self._revision

    @property
    def edits(self) -> Lineage:
        """Where the content is not what the model computes for the tokens; empty if it is."""
        return self._log.edits

    @property
    def exact_n_tokens(self) -> int:
        """How many tokens at the start lie before the first of ``edits``."""
        return min([self.n_tokens, *(edit.start for edit in self.edits)])

    def buffer(self, index: int) -> memoryview:
        """Writable bytes of tensor ``index``: C-contiguous, ``nbytes`` long, format ``B``.

        Zero-copy over the live tensor; it keeps the memory alive.

        Raises:
            ClosedModelError: the model was closed.
        """
        import torch

        view = self.live(self._layout.tensors[index].name)
        # As uint8, because numpy has no bfloat16. The array holds on to the view's storage.
        return view.reshape(-1).view(torch.uint8).numpy().data

    def read_until(self, done: Future[Any]) -> None:
        """Say that another thread reads what the cache holds now, until ``done``.

        Computing on goes on meanwhile; whatever would change what is held waits for it.
        """
        self._readers = [reader for reader in self._readers if not reader.done()]
        self._readers.append(done)

    def wait_for_readers(self) -> None:
        """Wait until no other thread reads the cache, as before writing into it by hand."""
        if self._readers:
            wait(self._readers)
            self._readers.clear()

    def truncate(self, n_tokens: int) -> None:
        """Forget every token from position ``n_tokens`` on; 0 gives a clean, empty cache.

        Clean is what the tensors held at first: some programs never reset recurrent
        state or slot positions by themselves. ``edits`` behind what is left are undone with it.

        Raises:
            CapacityError: the cache holds fewer tokens than that.
            ClosedModelError: the model was closed.
            InputError: ``n_tokens`` is not a whole number of at least 0.
            RewindError: a ring no longer has the window that this length needs, or a
                recurrent state would have to be undone. Nothing was changed.
        """
        self.check_open()
        if type(n_tokens) is not int or n_tokens < 0:
            raise InputError(f"truncate: expected a length of at least 0, found {n_tokens!r}")
        self.wait_for_readers()
        self._log.truncate(n_tokens)
        self._cut_back(n_tokens)
        self._changed()
        if n_tokens == 0:
            for name, initial in self._initial.items():
                if initial is None:
                    self._views[name].zero_()
                else:
                    self._views[name].copy_(initial)

    def extend(self, tokens: Sequence[int], *, logits: torch.Tensor | None = None) -> None:
        """Record that the model computed ``tokens`` behind the last one.

        ``logits`` ``[vocab]`` are those after the last of them; a layout that keeps
        them needs them, every other ignores them.

        Raises:
            CapacityError: there is no room for that many.
            ClosedModelError: the model was closed.
            InputError: the layout keeps logits, and these are not of its shape.
        """
        self.check_open()
        if self.n_tokens + len(tokens) > self._capacity_n_tokens:
            raise CapacityError(
                f"the cache has room for {self._capacity_n_tokens} tokens: it holds "
                f"{self.n_tokens}, and {len(tokens)} more do not fit"
            )
        view = self._logits_view()
        if view is not None:
            # An array of numpy's or a list has no copy_: only a tensor is taken.
            if not hasattr(logits, "copy_") or logits is None or logits.shape != view.shape:
                found = getattr(logits, "shape", None)
                raise InputError(
                    f"extend: expected the last token's logits, a tensor {list(view.shape)}, "
                    f"found {type(logits).__name__}{'' if found is None else f' {list(found)}'}"
                )
            view.copy_(logits)
        self._log.extend(tokens)
        if self._knows_cuts:
            self._cuts.append(self.n_tokens)
        self._changed()

    def adopt(self, tokens: Sequence[int], edits: Lineage = ()) -> None:
        """Record that the buffers now hold what ``tokens`` require, put there by a load.

        Raises:
            ClosedModelError: the model was closed.
        """
        self.check_open()
        self.wait_for_readers()
        self._log.adopt(tokens, edits)
        self._cuts, self._knows_cuts = [], False
        self._changed()

    def go_back(self, still: Still) -> None:
        """Be again what the cache was when ``still`` was taken, rings and recurrent state too.

        Raises:
            ClosedModelError: the model was closed.
            RewindError: the cache does not hold the tokens of ``still`` any more.
        """
        self.check_open()
        n_tokens = len(still.tokens)
        edits = tuple(edit for edit in self.edits if edit.start < n_tokens)
        if self.tokens[:n_tokens] != still.tokens or edits != still.edits:
            raise RewindError(
                f"go_back: expected a cache that still holds the {n_tokens} tokens of then, found "
                "others; load them, or compute them again"
            )
        self.wait_for_readers()
        for index, spec in enumerate(self._layout.tensors):
            if not spec.kind.rules.is_whole:
                self.buffer(index)[:] = still.buffer(index)
        self._log.restore(still.tokens, still.held, still.edits)
        self._cut_back(n_tokens)
        self._changed()

    def set(self, name: str, tensor: torch.Tensor) -> None:
        """Copy ``tensor`` over the live tensor ``name``; see ``mark_edited``.

        ``truncate(0)`` makes the cache clean again.

        Raises:
            ClosedModelError: the model was closed.
            InputError: there is no such tensor, or shape or dtype differ.
        """
        import torch

        self.check_open()
        live = self._views.get(name)
        if live is None:
            raise InputError(f"the cache has no tensor {name!r}; it has: {', '.join(self._views)}")
        if not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"tensor {name!r}: expected a torch.Tensor, found {type(tensor).__name__}"
            )
        if tensor.shape != live.shape or tensor.dtype != live.dtype:
            raise InputError(
                f"tensor {name!r}: expected {_dtype_name(live)} {list(live.shape)}, "
                f"found {_dtype_name(tensor)} {list(tensor.shape)}"
            )
        self.mark_edited()  # waits for readers
        live.copy_(tensor.detach())

    def mark_edited(self, *, start: int = 0) -> None:
        """Say that the content of tokens from ``start`` on is about to be written by hand.

        What is saved of it answers no look-up but for the very same content: a load by the
        session's name, or with this cache's ``edits``.

        Raises:
            ClosedModelError: the model was closed.
        """
        self.check_open()
        self.wait_for_readers()
        self._log.edit(Edit(start, os.urandom(32)))
        self._revision += 1

    def edit(self, tokens: Sequence[int], held: Held, edit: Edit) -> None:
        """Say that the buffers hold ``tokens`` now, made by hand from ``edit.start`` on.

        Raises:
            ClosedModelError: the model was closed.
        """
        self.check_open()
        self.wait_for_readers()
        edits = tuple(one for one in self.edits if one.start < len(tokens))
        self._log.restore(tokens, held, edits)
        if edit.start < len(tokens):
            self._log.edit(edit)
        self._cut_back(edit.start)
        self._knows_cuts = False
        self._changed()

    def copy_all(self) -> WholeCopy:
        """A copy of all buffers, used or not, to put back after an experiment."""
        self.check_open()
        return WholeCopy(
            buffers=[bytes(self.buffer(index)) for index in range(len(self))],
            tokens=self.tokens,
            held=self.held,
            edits=self.edits,
            cuts=(list(self._cuts), self._knows_cuts),
        )

    def put_back(self, copy: WholeCopy) -> None:
        """Be again what the cache was when ``copy`` was made.

        Raises:
            ClosedModelError: the model was closed.
        """
        self.check_open()
        self.wait_for_readers()
        for index, content in enumerate(copy.buffers):
            self.buffer(index)[:] = content
        self._log.restore(copy.tokens, copy.held, copy.edits)
        self._cuts, self._knows_cuts = list(copy.cuts[0]), copy.cuts[1]
        self._changed()

    def live(self, name: str) -> torch.Tensor:
        """The live tensor ``name``, zero-copy; see ``TensorView.tensor``."""
        self.check_open()
        # An alias: what the caller does to the tensor object (resize_, set_) stays with the caller.
        return self._views[name].detach()

    def layer(self, layer: int) -> LayerView:
        """The tensors of one layer, by role.

        Raises:
            ClosedModelError: the model was closed.
            InputError: there is no such layer.
        """
        self.check_open()
        views = {
            spec.role: TensorView(self, spec)
            for spec in self._layout.tensors
            if spec.layer == layer and spec.role != LOGITS_ROLE
        }
        if not views:
            layers = sorted({spec.layer for spec in self._layout.tensors})
            raise InputError(
                f"expected a layer among {', '.join(map(str, layers))}, found {layer!r}"
            )
        return LayerView(layer, views)

    def __getitem__(self, name: str) -> TensorView:
        self.check_open()
        for spec in self._layout.tensors:
            if spec.name == name:
                return TensorView(self, spec)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter([spec.name for spec in self._layout.tensors])

    def __len__(self) -> int:
        return len(self._layout.tensors)

    # Two caches are the same one or they are not; comparing tensors by == has no one answer.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} of {len(self)} tensors, holding {self.n_tokens} "
            f"of {self._capacity_n_tokens} tokens>"
        )

    def check_open(self) -> None:
        """Raise ClosedModelError if the tensors may not be used any more."""

    def _cut_back(self, n_tokens: int) -> None:
        while self._cuts and self._cuts[-1] > n_tokens:
            self._cuts.pop()
            self._knows_cuts = True
        # Within a piece: what is left of it was computed with the rest of it.
        if n_tokens != (self._cuts[-1] if self._cuts else 0):
            self._knows_cuts = False

    def _changed(self) -> None:
        self._revision += 1
        self._snapshot = None

    def _logits_view(self) -> torch.Tensor | None:
        """The live tensor of role ``logits``; a layout has it last, or not at all."""
        last = self._layout.tensors[-1]
        return self._views[last.name] if last.role == LOGITS_ROLE else None


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
