"""The sampler: its choices, its state, and what it refuses."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from kvstore.errors import InputError  # noqa: E402  after the check that torch is there
from runtime_adapter import Sampler  # noqa: E402
from runtime_adapter.session.cuts import Cuts  # noqa: E402

pytestmark = pytest.mark.adapter

LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(torch.tensor)


def naive_candidates(logits, *, temperature, top_k, top_p):
    """Token ids that may be drawn, and their probabilities, one at a time."""
    order = sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))
    order = order[: top_k or len(order)]
    scores = torch.tensor([float(logits[token]) / temperature for token in order]).double()
    kept, total = {}, 0.0
    for token, probability in zip(order, scores.softmax(0).tolist(), strict=True):
        if total >= top_p:
            break
        kept[token] = probability
        total += probability
    return kept


@given(logits=LOGITS)
def test_temperature_0_takes_the_likeliest_and_draws_nothing(logits):
    sampler = Sampler()
    assert sampler.pick(logits) == int(logits.argmax())
    assert sampler == Sampler()


@given(
    logits=LOGITS,
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.floats(0.05, 1),
    seed=st.integers(0, 2**63 - 1),
)
def test_only_candidates_are_drawn(logits, temperature, top_k, top_p, seed):
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    # A hair more than top_p: sums of rounded numbers.
    allowed = naive_candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p + 1e-6)
    assert {sampler.pick(logits) for _ in range(10)} <= set(allowed)
    assert sampler.n_drawn == 10


def test_draws_have_the_probabilities_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    sampler = Sampler(temperature=0.7, top_k=4, top_p=0.97, seed=3)
    kept = naive_candidates(logits, temperature=0.7, top_k=4, top_p=0.97)
    total = sum(kept.values())
    n = 20_000
    counts = Counter(sampler.pick(logits) for _ in range(n))
    assert set(counts) == set(kept)
    for token, probability in kept.items():
        assert abs(counts[token] / n - probability / total) < 0.02


def test_the_sequence_depends_on_the_seed_and_on_how_many_were_drawn_alone():
    logits = torch.zeros(50)
    sampler = Sampler(temperature=1.0, seed=5)
    first = [sampler.pick(logits) for _ in range(20)]
    # Must not change: stored conversations go on with it.
    assert first[:8] == PINNED
    again = Sampler.from_metadata({**sampler.to_metadata(), "n_drawn": 10})
    assert [again.pick(logits) for _ in range(10)] == first[10:]
    other = Sampler(temperature=1.0, seed=6)
    assert [other.pick(logits) for _ in range(20)] != first


PINNED = [36, 12, 42, 2, 41, 6, 23, 40]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": True},
        {"n_drawn": -1},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampler(**wrong)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_logits_without_a_number_to_go_by_are_refused(value):
    for sampler in (Sampler(), Sampler(temperature=1.0)):
        with pytest.raises(InputError, match="finite logits"):
            sampler.pick(torch.full((4,), value))


# ------------------------------------------------------------------ cuts


@given(st.sets(st.integers(1, 200)), st.integers(0, 200))
def test_cuts_answer_as_a_plain_set_does(positions, place):
    cuts = Cuts()
    for position in positions:
        cuts.add(position)
        cuts.add(position)
    cuts.add(0)
    assert list(cuts.positions) == sorted(positions)
    assert cuts.at_or_before(place) == max((at for at in positions if at <= place), default=0)
    assert cuts.after(place) == min((at for at in positions if at > place), default=None)
    again = Cuts.from_runs(cuts.to_runs(), n_tokens=cuts.last)
    assert list(again.positions) == list(cuts.positions)
    cuts.forget_after(place)
    assert list(cuts.positions) == sorted(at for at in positions if at <= place)
    assert list(again.copy().positions) == sorted(positions)


@pytest.mark.parametrize("runs", [[[0, 1]], [[1, 0]], [[5, 3]], [[1.0, 1]], [[10**18, 10**18]]])
def test_pieces_that_cannot_be_are_refused(runs):
    with pytest.raises(InputError, match="expected pieces"):
        Cuts.from_runs(runs, n_tokens=10)
