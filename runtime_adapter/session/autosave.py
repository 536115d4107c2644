"""Saving behind the generation: the thread that stores a still picture of the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

from kvstore import Store
from kvstore.errors import SaveTimeoutError
from runtime_adapter.caches.still import Still
from runtime_adapter.session.claim import Claim


class BackgroundSaver:
    """Saves one session, one save at a time, on a thread of its own.

    An error is kept until ``check`` or ``wait`` raises it, once; until then nothing is saved.
    """

    def __init__(self, store: Store) -> None:
        """Save into ``store``."""
        self._store = store
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvstore-autosave")
        self._running: Future[Any] | None = None
        self._when_saved: Callable[[], None] = _nothing
        self._error: Exception | None = None

    def submit(
        self,
        still: Still,
        *,
        name: str | None,
        metadata: Mapping[str, Any] | None,
        replace: bool,
        claim: Claim | None,
        when_saved: Callable[[], None],
    ) -> Future[Any] | None:
        """Save ``still`` from now on; None if an error waits to be raised.

        ``claim`` is that of the name. ``when_saved`` is called by whoever settles it next,
        unless it failed.
        """
        self.settle()
        if self._error is not None:
            return None
        self._when_saved = when_saved

        def save() -> None:
            if claim is not None:
                claim.check()
            self._store.save_session(
                still, still.tokens, name=name, metadata=metadata, replace=replace
            )
            if claim is not None:
                claim.renew()

        self._running = self._thread.submit(save)
        return self._running

    def settle(self, timeout: float | None = None) -> None:
        """Wait for the save under way, and keep its error.

        Raises:
            SaveTimeoutError: it has not ended after ``timeout`` seconds; it goes on.
        """
        if self._running is None:
            return
        if not wait_for([self._running], timeout).done:
            raise SaveTimeoutError(
                f"expected the autosave under way to end within {timeout} seconds, but it goes "
                "on; wait longer"
            )
        try:
            self._running.result()
        except Exception as error:  # noqa: BLE001  whatever it is, the next call raises it
            self._error = error
        else:
            self._when_saved()
        self._running = None  # not before: an interrupted wait must not forget a running save

    def check(self) -> None:
        """Raise the error of a save that has ended."""
        if self._running is not None and self._running.done():
            self.settle()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the save under way, and raise its error.

        Raises:
            SaveTimeoutError: it has not ended after ``timeout`` seconds; it goes on.
        """
        self.settle(timeout)
        self.check()

    def forget_error(self) -> None:
        """What failed was saved by other means."""
        self._error = None

    def close(self) -> None:
        """Wait for the save under way, and end the thread."""
        self.settle()
        self._thread.shutdown(wait=True)


def _nothing() -> None:
    """For nobody who waits."""
