"""The conformance suite over planned caches: really exported programs in the real runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("executorch")

from kvstore import LiveCache
from runtime_adapter import Model
from tests import programs
from tests.adapter.test_kinds import each
from tests.conformance import CacheConformance

pytestmark = [pytest.mark.adapter, pytest.mark.slow]

NAMES = ("stock_fp32", "quantized_cache", "ring", "quantized_ring", "sink", "lfm2", "qwen35")


class TestPlannedCache(CacheConformance):
    """Each new cache is a program loaded anew."""

    stops: Sequence[int] = (1, 6, 9, 16, 17, 40, 61)

    @pytest.fixture(autouse=True, params=each(NAMES))
    def _choose(self, request: pytest.FixtureRequest) -> Any:
        self.path = programs.path(request.param)
        self.models: list[Model] = []
        yield
        for model in self.models:
            model.close()

    def new(self) -> LiveCache:
        self.models.append(Model.open(self.path))
        return self.models[-1].cache

    def compute(self, cache: LiveCache, tokens: Sequence[int]) -> None:
        model = next(model for model in self.models if model.cache is cache)
        model.forward(tokens, start=len(cache.tokens))
