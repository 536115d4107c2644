"""A program that is open: give it tokens, get logits, and share its cache with a store.

``Model.open`` does all that a stock ``.pte`` needs: it analyses the file (once; the
result is remembered), gives its buffers names in a copy if the exporter gave
none, loads the operator libraries, and hands out the live cache.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvstore import token_ids, use_kernels
from kvstore.errors import (
    CapacityError,
    PositionError,
    ProgramError,
    ProgramSignatureError,
    TokensError,
)
from kvstore.layout import LOGITS_ROLE, Fingerprint, Layout, TensorSpec
from runtime_adapter.caches.planned import PlannedCache
from runtime_adapter.preparation import prepared
from runtime_adapter.program.analysis import ProgramAnalysis
from runtime_adapter.runtime import method as runtime

if TYPE_CHECKING:
    import torch


class Model:
    """One method of an ExecuTorch program, with its live cache. Make one with ``Model.open``.

    Invariant: ``cache.tokens`` are the tokens that the planned buffers stand for; ``forward``
    adds to them only what the runtime has finished.

    ``forward`` may be called from several threads (calls wait for each other), but the
    cache has one content: two conversations need two models.
    """

    __slots__ = ("_analysis", "_cache", "_lock", "_method", "_named_copy", "_path")

    def __init__(
        self,
        *,
        path: Path,
        analysis: ProgramAnalysis,
        method: runtime.LoadedMethod,
        named_copy: Path | None,
    ) -> None:
        """Take over a loaded method. Use ``Model.open``."""
        self._path = path
        self._analysis = analysis
        self._method = method
        self._named_copy = named_copy
        self._lock = threading.RLock()
        self._cache = PlannedCache(
            layout=analysis.layout,
            fingerprint=analysis.fingerprint,
            views=[_live(method, spec, path=path) for spec in analysis.layout.tensors],
            capacity_n_tokens=analysis.capacity_n_tokens,
        )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        data_path: str | os.PathLike[str] | None = None,
        named_copy: str | os.PathLike[str] | None = None,
        method: str = "forward",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Model:
        """The program at ``path``, ready to run, with an empty cache.

        ``data_path`` is the ``.ptd`` with its weights, if they lie outside. A program whose buffers
        have no names (stock exports) is loaded from a named copy: at ``named_copy``, or in
        ``cache_dir`` (default: the user's cache directory), where it is reused. The first time
        a file is seen it is analysed, and takes its first steps in a process of its own, since a
        damaged one may not survive them; that takes some ten seconds. Later opening takes one.

        Raises:
            InputError: a path argument is not a path.
            ProgramError: the file is missing, damaged, not a program, has no cache that can be
                served, or cannot be loaded here; its subclasses say which.
        """
        with prepared(
            path, data_path=data_path, named_copy=named_copy, method=method, cache_dir=cache_dir
        ) as program:
            loaded = runtime.LoadedMethod(
                program.load_path, method=method, data_path=program.data_path
            )
            program.check_unchanged()
            _use_torch_kernels()
            return cls(
                path=program.path,
                analysis=program.analysis,
                method=loaded,
                named_copy=program.named_copy,
            )

    @property
    def path(self) -> Path:
        """The program as it was given to ``open``."""
        return self._path

    @property
    def named_copy(self) -> Path | None:
        """The copy with named buffers that is loaded, or None if the program had names."""
        return self._named_copy

    @property
    def cache(self) -> PlannedCache:
        """The live cache: for ``Store.save_session`` and ``load_session``, and by tensor name."""
        return self._cache

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model this is: digests of weights, program and layout."""
        return self._analysis.fingerprint

    @property
    def layout(self) -> Layout:
        """The tensors of the cache."""
        return self._analysis.layout

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that the cache has room for."""
        return self._cache.capacity_n_tokens

    @property
    def piece_n_tokens(self) -> int:
        """How many tokens ``forward`` computes at once at most; more come in several pieces."""
        return _piece_n_tokens(self.layout, self._analysis.signature.max_n_tokens)

    @property
    def vocab_size(self) -> int:
        """Number of logits; token ids are below it."""
        return self._analysis.signature.vocab_size

    @property
    def logits(self) -> torch.Tensor | None:
        """The last token's logits, float32 ``[vocab]``, if the cache keeps them; see there.

        Raises:
            ClosedModelError: the model was closed.
        """
        with self._lock:
            return self._cache.logits

    def check_tokens(self, tokens: Iterable[Any]) -> list[int]:
        """``tokens`` as ids that this model knows, in any form that ``forward`` takes.

        Raises:
            TokensError: they are none.
        """
        ids = token_ids(tokens)
        _check_vocabulary(ids, vocab_size=self.vocab_size)
        return ids.tolist()

    def forward(self, tokens: Iterable[Any], *, start: int) -> torch.Tensor:
        """Compute ``tokens`` from position ``start`` on; logits of the last one, ``[vocab]``.

        ``tokens`` are ids as a list, tuple, or 1-D integer array or tensor. ``start`` must be
        the number of tokens that the cache holds. A prompt longer than the program takes at
        once is computed in pieces. No tokens at all are fine where the cache keeps the last
        token's logits, as after a load of all that was asked for: the result is those. The
        result is float32 and owns its memory.

        Raises:
            CapacityError: the cache has no room for so many tokens; nothing was computed.
            ClosedModelError: the model was closed.
            PositionError: ``start`` is not the cache's length; nothing was computed.
            ProgramError: the runtime stopped. The cache holds what was finished before,
                or nothing if it has rings or recurrent state, which are then half written.
            TokensError: the ids are not usable; nothing was computed.
        """
        with self._lock:
            cache = self._cache
            cache.check_open()
            held_logits = cache.logits
            if held_logits is not None and _is_empty(tokens):
                _check_start(start, n_tokens=cache.n_tokens)
                return held_logits
            ids = token_ids(tokens)
            _check_vocabulary(ids, vocab_size=self.vocab_size)
            _check_start(start, n_tokens=cache.n_tokens)
            if start + len(ids) > self.capacity_n_tokens:
                raise CapacityError(
                    f"forward: the cache has room for {self.capacity_n_tokens} tokens: "
                    f"it holds {start}, and {len(ids)} more do not fit; shorten the prompt, or "
                    "export the program with a larger export.max_context_length"
                )
            piece_n_tokens = self.piece_n_tokens
            *pieces, last = [
                ids[first : first + piece_n_tokens].tolist()
                for first in range(0, len(ids), piece_n_tokens)
            ]
            for piece in pieces:
                self._compute(piece)
            return self._compute(last)

    def close(self) -> None:
        """Let go of the program. Live tensors handed out before stay readable."""
        with self._lock:
            self._cache.close()
            self._method.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {self._path}: {self._cache!r}>"

    def _compute(self, piece: list[int]) -> torch.Tensor:
        """Run the program on ``piece`` behind what the cache holds; the last token's logits."""
        arguments = self._analysis.signature.arguments(piece, start=self._cache.n_tokens)
        try:
            logits = self._last_logits(self._method.execute(runtime.input_tensors(arguments)))
            # Only now: if the runtime stops, the cache's length is what surely holds.
            self._cache.extend(piece, logits=logits)
        except BaseException:  # an interrupt after the program ran leaves it ahead of the cache
            if not self.layout.is_full:
                self._cache.truncate(0)
            raise
        return logits

    def _last_logits(self, outputs: list[Any]) -> torch.Tensor:
        """Logits ``[vocab]`` from ``[1, vocab]`` (the last token's) or ``[1, n, vocab]``."""
        import torch

        logits = outputs[0] if outputs else None
        if not isinstance(logits, torch.Tensor) or logits.ndim not in (2, 3):
            found = list(logits.shape) if isinstance(logits, torch.Tensor) else logits
            raise ProgramSignatureError(
                f"{self._path}: expected logits [1, vocab] or [1, n, vocab], found {found}"
            )
        last = logits[0] if logits.ndim == 2 else logits[0, -1]
        return last.to(dtype=torch.float32, copy=True)


def _piece_n_tokens(layout: Layout, limit_n_tokens: int) -> int:
    """How many tokens may be computed at once.

    A piece is written into a ring before its first token looks back, so it may only overwrite
    what that token does not see any more.
    """
    for spec in layout.tensors:
        if spec.window_n_tokens:
            ring_n_slots = spec.capacity_n_tokens - spec.sink_n_tokens
            spare_n_slots = ring_n_slots - spec.window_n_tokens
            # No spare slot: the program's window is not known, or it makes do without.
            spare_n_slots = spare_n_slots or ring_n_slots - 1
            limit_n_tokens = min(limit_n_tokens, spare_n_slots + 1)
    return limit_n_tokens


def _is_empty(tokens: Any) -> bool:
    try:
        return len(tokens) == 0
    except TypeError:  # an iterator; let token_ids look
        return False


def _check_vocabulary(ids: Sequence[int], *, vocab_size: int) -> None:
    if max(ids) >= vocab_size:
        index = next(index for index, token in enumerate(ids) if token >= vocab_size)
        raise TokensError(
            f"expected token ids below the model's vocabulary size {vocab_size}, "
            f"found {ids[index]} at index {index}; is it another model's tokenizer?"
        )


def _check_start(start: int, *, n_tokens: int) -> None:
    try:
        is_number = not isinstance(start, bool) and operator.index(start) == start
    except TypeError:
        is_number = False
    if not is_number:
        raise PositionError(f"forward: expected a whole number as start, found {start!r}")
    if start != n_tokens:
        step = (
            f"call cache.truncate({start}) to forget the rest"
            if 0 <= start < n_tokens
            else "compute or load the tokens before it first"
        )
        raise PositionError(
            f"forward: expected start={n_tokens}, the number of tokens in the cache, "
            f"found {start}; {step}"
        )


def _live(method: runtime.LoadedMethod, spec: TensorSpec, *, path: Path) -> torch.Tensor:
    """The planned buffer behind ``spec``, or memory of our own for the logits."""
    import torch

    if spec.role == LOGITS_ROLE:
        return torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
    try:
        return method.view(spec.name)
    except KeyError as error:
        raise ProgramError(
            f"{path}: the runtime does not find the buffer {spec.name!r} that the analysis found"
        ) from error


def _use_torch_kernels() -> None:
    """Lossy codecs compute several times as fast in torch, which is there now."""
    from runtime_adapter.runtime.kernels import TorchKernels

    use_kernels(TorchKernels())
