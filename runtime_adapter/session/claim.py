"""Who saved a named conversation last, among the sessions of one store in this process.

What another *process* saved meanwhile the store notices by itself; two sessions on one store
look the same to it.
"""

from __future__ import annotations

import threading
import weakref

from kvstore import Store
from kvstore.errors import SessionConflictError

_n_saves: weakref.WeakKeyDictionary[Store, dict[str, int]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class Claim:
    """One session's view of a name: it may save what it saw last, or begin anew."""

    def __init__(self, store: Store, name: str) -> None:
        """Claim ``name`` as it is now."""
        self._store = store
        self._name = name
        self._seen = self._now()

    def check(self) -> None:
        """Raise if another session saved under the name since.

        Raises:
            SessionConflictError: it did.
        """
        if self._now() != self._seen:
            raise SessionConflictError(
                f"session {self._name!r} was saved by another Session on this store since this one "
                "began or saved; open it anew, or keep this one under another name with fork"
            )

    def renew(self) -> None:
        """This session saves now."""
        with _LOCK:
            names = _n_saves.setdefault(self._store, {})
            names[self._name] = self._seen = names.get(self._name, 0) + 1

    def _now(self) -> int:
        with _LOCK:
            return _n_saves.get(self._store, {}).get(self._name, 0)
