"""Saving behind the generation: a still picture of the cache, and the thread that stores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kvstore import Held, Store
from kvstore.errors import InputError
from kvstore.layout import Fingerprint, Layout
from runtime_adapter.caches.live import LiveTensors


class Still:
    """The cache as it is now, for a save on another thread: a ``LiveCache`` to read from.

    Computing on leaves the slots of tokens that are held as they are in full tensors, so these
    are not copied; rings and recurrent state are. Invalid once the cache goes back.
    """

    def __init__(self, cache: LiveTensors) -> None:
        """Copy what the next step will overwrite."""
        self._layout = cache.layout
        self._fingerprint = cache.fingerprint
        self._tokens = cache.tokens
        self._held = cache.held
        self._capacity_n_tokens = cache.capacity_n_tokens
        self._taint = cache.taint
        self._buffers = [
            cache.buffer(index)
            if spec.kind.rules.is_whole
            else memoryview(bytearray(cache.buffer(index)))
            for index, spec in enumerate(cache.layout.tensors)
        ]

    @property
    def fingerprint(self) -> Fingerprint:
        """Which model it belongs to."""
        return self._fingerprint

    @property
    def layout(self) -> Layout:
        """The tensors."""
        return self._layout

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids that it holds."""
        return self._tokens

    @property
    def held(self) -> Held:
        """How the cache came to hold them."""
        return self._held

    @property
    def capacity_n_tokens(self) -> int:
        """Number of tokens that the cache has room for."""
        return self._capacity_n_tokens

    @property
    def taint(self) -> str | None:
        """Why the content was no longer exact, or None."""
        return self._taint

    def buffer(self, index: int) -> memoryview:
        """Bytes of tensor ``index``."""
        return self._buffers[index]

    def truncate(self, n_tokens: int) -> None:
        """Never: it is there to be read.

        Raises:
            InputError: always.
        """
        raise InputError(f"expected a live cache to cut to {n_tokens} tokens, found a still one")

    def adopt(self, tokens: Sequence[int]) -> None:
        """Never: it is there to be read.

        Raises:
            InputError: always.
        """
        raise InputError(f"expected a live cache for {len(tokens)} tokens, found a still one")


class BackgroundSaver:
    """Saves one session, one save at a time, on a thread of its own.

    An error is kept until ``check`` or ``wait`` raises it, once; until then nothing is saved.
    """

    def __init__(self, store: Store) -> None:
        """Save into ``store``."""
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-autosave")
        self._running: Future[Any] | None = None
        self._error: Exception | None = None

    def submit(
        self, still: Still, *, name: str | None, metadata: Mapping[str, Any], replace: bool
    ) -> bool:
        """Save ``still`` from now on; False if an error waits to be raised."""
        self.settle()
        if self._error is not None:
            return False
        self._running = self._thread.submit(
            self._store.save_session,
            still,
            still.tokens,
            name=name,
            metadata=metadata,
            replace=replace,
        )
        return True

    def settle(self) -> None:
        """Wait for the save under way; its error is kept."""
        if self._running is None:
            return
        try:
            self._running.result()
        except Exception as error:  # noqa: BLE001  whatever it is, the next call raises it
            self._error = error
        self._running = None  # not before: an interrupted wait must not forget a running save

    def check(self) -> None:
        """Raise the error of a save that has ended."""
        if self._running is not None and self._running.done():
            self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait for the save under way, and raise its error."""
        self.settle()
        self.check()

    def close(self) -> None:
        """Wait for the save under way, and end the thread."""
        self.settle()
        self._thread.shutdown(wait=True)
