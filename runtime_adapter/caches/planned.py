"""A method's planned buffers as one cache: the ``LiveCache`` of an ExecuTorch program.

It knows which tokens its buffers hold, because ``Model.forward`` and
``Store.load_session`` tell it.
"""

from __future__ import annotations

from kvstore.errors import ClosedModelError
from runtime_adapter.caches.live import LiveTensors


class PlannedCache(LiveTensors):
    """The live planned buffers of one loaded method.

    ``cache[name].tensor`` is of the planned shape and dtype, and stays readable after the model is
    closed or gone (it keeps the memory alive). For the rest see ``LiveTensors``.
    """

    __slots__ = ()

    def close(self) -> None:
        """Refuse every later use. Tensors and memoryviews handed out before stay readable."""
        self._views = {}

    def check_open(self) -> None:
        """Raise ClosedModelError if the model was closed."""
        if not self._views:  # a layout has at least one tensor
            raise ClosedModelError(
                "the model of this cache was closed; open it again with Model.open"
            )
