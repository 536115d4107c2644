"""The benchmarks run, and say what they found; how fast anything is, no test asks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.checkout

FOLDER = ROOT / "benchmarks"


def run_benchmark(name, *arguments):
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def modules(monkeypatch):
    """The folder's modules can be imported, as its scripts do it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


@pytest.mark.slow
def test_restores_and_saves_are_compared_and_make_a_page(tmp_path):
    options = ["--normal", "--dtypes", "bfloat16", "--codecs", "exact", "no-such-codec"]
    run_benchmark(
        *("restore", *options, "--peers", "flat file", "--n-tokens", 300, "--rounds", 1),
        *("--json", tmp_path / "restore.json"),
    )
    run_benchmark(
        *("save", *options[:-1], "--peers", "flat file", "--lengths", 64, 300, "--turns", 1),
        *("--json", tmp_path / "save.json"),
    )
    rows = json.loads((tmp_path / "restore.json").read_text())["tables"][0]["rows"]
    assert [row["who"] for row in rows] == [
        *("kvstore exact", "kvstore exact, mapped", "flat file", "memcpy"),
        "kvstore no-such-codec",
    ]
    assert rows[-1]["note"].startswith("not offered")
    run_benchmark("report", "--results", tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "| kvstore exact |" in page
    assert "not measured" in page


@pytest.mark.slow
def test_what_is_not_bytes_is_measured_in_a_store_of_many_sessions(tmp_path, modules):
    import overhead

    names = overhead.measure_all(
        overhead.fill([overhead.tokens_of(index) for index in range(3)], tmp_path / "three.db"),
        [overhead.tokens_of(index) for index in range(3)],
        n_rounds=1,
    )
    assert "a prompt that nothing matches" in names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flat file", "safetensors", "torch.save", "mlx-lm"])
def test_a_peer_restores_what_it_saved(name, tmp_path, modules):
    import peers
    import synthetic

    if (reason := peers.not_installed(name)) is not None:
        pytest.skip(reason)
    cache = synthetic.SyntheticCache(synthetic.llama_1b_layout(capacity_n_tokens=256))
    peer = peers.make(name, cache, n_tokens=256, dtype="bfloat16")
    peer.save(tmp_path / "saved")
    peer.restore(tmp_path / "saved")
    for source, target in peer.pairs():
        assert bytes(source) == bytes(target)


def test_contenders_take_turns_and_only_what_runs_is_timed(modules):
    import measure

    seen = []
    contenders = {
        name: measure.Contender(
            run=lambda name=name: seen.append(name), before=lambda: seen.append("before")
        )
        for name in ("a", "b")
    }
    found = measure.interleaved(contenders, n_rounds=2, n_warmups=0)
    assert [name for name in seen if name != "before"] == ["a", "b", "b", "a"]
    assert seen[::2] == ["before"] * 4
    assert all(spread.low <= spread.median <= spread.high for spread in found.values())


def test_a_cell_shows_its_median_and_its_spread(modules):
    import measure

    assert measure.shown(measure.spread([0.001, 0.0021, 0.5]), "ms") == "2.10 (1.00\u2013500)"
    assert measure.shown(None, "ms") == "\u2013"
    assert measure.shown(1.5, "x") == "1.50x"


def test_a_missed_target_is_called_missed(modules):
    import measure

    result = measure.Result(name="n", question="q", method="m")
    result.target("as fast", 0.99, 1.0)
    result.target("as fast", 1.0, 1.0)
    result.target("as fast", None, 1.0)
    assert [measure.verdict(target.is_met) for target in result.targets] == [
        *("MISSED", "met", "not measured")
    ]
