"""Memory: a save and a load take a few chunks beyond the live cache, however long the session."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT

N_TOKENS = 6144
MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import kvstore
from synthetic import SyntheticCache, llama_1b_layout, random_ids

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

n_tokens = int(sys.argv[3])
cache = SyntheticCache(llama_1b_layout(capacity_n_tokens=n_tokens))
ids = random_ids(n_tokens)
with kvstore.open(sys.argv[1]) as store:
    cache.extend(ids[:600])  # the first calls import numpy and zstandard, and start the threads
    store.save_session(cache, cache.tokens, name="warm")
    cache.truncate(0)
    store.load_session(cache, ids[:600])
    cache.truncate(0)
    cache.extend(ids)
    before = peak_mib()
    store.save_session(cache, ids, name="chat")
    saved = peak_mib()
    cache.truncate(0)
    assert store.load_session(cache, ids).n_tokens == n_tokens - 1
    print(cache.layout.nbytes / 2**20, saved - before, peak_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.checkout
def test_a_long_session_takes_no_more_memory_than_a_short_one(store_path, run_source):
    measured = run_source(MEASURE, store_path, ROOT / "benchmarks", N_TOKENS)
    cache_mib, save_mib, load_mib = map(float, measured.split())
    assert cache_mib == 192
    assert save_mib < cache_mib / 3
    assert load_mib < cache_mib / 3
