"""The conformance suite over fakes of every layout."""

from __future__ import annotations

import pytest

from tests.conformance import CacheConformance
from tests.kinds_oracle import LAYOUTS, TracedCache

FEW = {"full", "ring_only", "sink_head_major", "quantized_ring", "mixed"}
"""What `make test` runs; the others are like them."""


def each_layout():
    return [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in LAYOUTS]


class TestFakes(CacheConformance):
    @pytest.fixture(autouse=True, params=each_layout())
    def _choose(self, request):
        self.layout = LAYOUTS[request.param]

    def new(self):
        return TracedCache(self.layout)

    def compute(self, cache, tokens):
        cache.compute(tokens)
        assert cache.wrong() == []
