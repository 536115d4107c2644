"""Caches in the caller's hands: any tensors that a model keeps its state in.

For programs that take their cache as inputs and return it, for static attention,
for eager PyTorch, and for whatever else can be called with tensors. ``examples/`` has
one of each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kvstore import Kind, token_ids
from kvstore.errors import InputError
from kvstore.layout import DTYPE_ITEMSIZE_NBYTES, Fingerprint, Layout, TensorSpec
from runtime_adapter.caches.identity import ModelFingerprint
from runtime_adapter.caches.live import LiveTensors

if TYPE_CHECKING:
    import numpy as np
    import torch

    Tensor = torch.Tensor | np.ndarray[Any, Any]


class TensorCache(LiveTensors):
    """A ``LiveCache`` over tensors that the caller holds, torch or NumPy, on the CPU.

    The store reads from them and writes into them, in place and without a copy. Say what the
    model did, since nobody else can: ``extend`` after each step with the tokens that it
    computed, and ``replace`` if a step returns new tensors instead of writing into the old.
    What else counts positions (a mask, a position input) is the caller's to set to
    ``n_tokens`` after a load or a ``truncate``.
    """

    __slots__ = ()

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        specs: Sequence[TensorSpec],
        fingerprint: ModelFingerprint,
        capacity_n_tokens: int | None = None,
    ) -> None:
        """Take ``tensors``, one for each of ``specs`` by name, as at the start of a conversation.

        ``specs`` say what each tensor is; ``tensor_spec`` makes one from a tensor. Their order is
        part of the layout. Recurrent models want a tensor of role ``logits`` last, float32
        ``[vocab]``; then ``extend`` takes the logits too. ``capacity_n_tokens`` is the model's own
        limit, if it is below what the tensors have room for.

        Raises:
            InputError: tensors and specs do not fit each other, or a tensor cannot be shared
                with the store as it is.
        """
        layout = Layout(tensors=tuple(specs))
        names = [spec.name for spec in layout.tensors]
        if set(names) != set(tensors):
            raise InputError(
                f"expected tensors named {', '.join(names)}, found {', '.join(tensors) or 'none'}"
            )
        super().__init__(
            layout=layout,
            fingerprint=Fingerprint(
                weights=fingerprint.weights, program=fingerprint.program, layout=layout.digest
            ),
            views=[shared_tensor(name, tensors[name]) for name in names],
            capacity_n_tokens=capacity_n_tokens,
        )

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        token_axis: int,
        fingerprint: ModelFingerprint,
        capacity_n_tokens: int | None = None,
    ) -> TensorCache:
        """A cache of tensors that all have one slot a token along ``token_axis``.

        Role and layer come from the names as ``tensor_spec`` says: two models should
        not share sessions because of them, but the same model has to use the same names.

        Raises:
            InputError: as the constructor.
        """
        specs = [
            tensor_spec(name, tensor, token_axis=token_axis) for name, tensor in tensors.items()
        ]
        return cls(
            tensors, specs=specs, fingerprint=fingerprint, capacity_n_tokens=capacity_n_tokens
        )

    def extend(self, tokens: Sequence[int], *, logits: torch.Tensor | None = None) -> None:
        """Record that the model computed ``tokens`` behind the last one.

        ``tokens`` come in any form that ``Store.load_session`` takes. ``logits`` ``[vocab]`` are
        those after the last of them; a layout that keeps them needs them.

        Raises:
            CapacityError: there is no room for that many.
            InputError: the layout keeps logits, and these are not of its shape.
            TokensError: the ids are not usable.
        """
        super().extend(token_ids(tokens), logits=logits)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on with ``tensors`` in place of those of the same names, which a step made of them.

        Call it together with ``extend``. No bytes are copied.

        Raises:
            InputError: there is no such tensor, or shape or dtype differ; nothing was changed.
        """
        views = {}
        for name, tensor in tensors.items():
            view, live = shared_tensor(name, tensor), self._views.get(name)
            if live is None:
                raise InputError(f"the cache has no tensor {name!r}; it has: {', '.join(self)}")
            if (view.shape, view.dtype) != (live.shape, live.dtype):
                raise InputError(
                    f"tensor {name!r}: expected {live.dtype} {list(live.shape)} as before, "
                    f"found {view.dtype} {list(view.shape)}"
                )
            views[name] = view
        self._views.update(views)


def tensor_spec(
    name: str,
    tensor: Tensor,
    *,
    token_axis: int | None,
    kind: Kind = Kind.FULL,
    role: str | None = None,
    layer: int | None = None,
    window_n_tokens: int = 0,
    sink_n_tokens: int = 0,
) -> TensorSpec:
    """What ``tensor`` is, for ``TensorCache``.

    A negative ``token_axis`` counts from the end; a checkpoint has None. Without ``role`` it is
    the last part of the name, without ``layer`` the first number in it (0 if there is
    none): ``layers.3.self_attn.k_cache`` is ``k_cache`` of layer 3.

    Raises:
        InputError: the tensor cannot be stored, or is not of that kind.
    """
    if not isinstance(name, str):
        raise InputError(f"expected the names of tensors as text, found {name!r}")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPE_ITEMSIZE_NBYTES:
        raise InputError(
            f"tensor {name!r}: expected a dtype among {', '.join(DTYPE_ITEMSIZE_NBYTES)}, "
            f"found {dtype}"
        )
    shape = tuple(int(size) for size in tensor.shape)
    if token_axis is not None and -len(shape) <= token_axis < 0:
        token_axis += len(shape)
    number = re.search(r"\d+", name)
    return TensorSpec(
        name=name,
        role=role if role is not None else name.rpartition(".")[2],
        layer=layer if layer is not None else int(number.group()) if number else 0,
        kind=kind,
        dtype=dtype,
        shape=shape,
        token_axis=token_axis,
        window_n_tokens=window_n_tokens,
        sink_n_tokens=sink_n_tokens,
    )


def shared_tensor(name: str, tensor: Any) -> torch.Tensor:
    """A torch tensor over the same memory as ``tensor``.

    Raises:
        InputError: it is no tensor, or its memory cannot be read and written as one run of bytes.
    """
    import numpy as np
    import torch

    if isinstance(tensor, np.ndarray):
        if not tensor.flags.c_contiguous:
            found = "one that is not contiguous; use numpy.ascontiguousarray(...) in the model too"
        elif not tensor.flags.writeable:
            found = "one that is read-only; use a copy in the model too"
        elif not tensor.dtype.isnative or str(tensor.dtype) not in DTYPE_ITEMSIZE_NBYTES:
            found = f"one of dtype {tensor.dtype}"
        else:
            return torch.from_numpy(tensor)
    elif not isinstance(tensor, torch.Tensor):
        found = type(tensor).__name__
    elif tensor.device.type != "cpu":
        found = f"one on {tensor.device}; the store reads the CPU's memory"
    elif tensor.layout is not torch.strided or not tensor.is_contiguous():
        found = "one that is not contiguous; use tensor.contiguous() in the model too"
    else:
        return tensor.detach()
    raise InputError(
        f"tensor {name!r}: expected a contiguous torch tensor or NumPy array, found {found}"
    )
