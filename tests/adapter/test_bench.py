"""``kvstore bench``, and the measuring beneath it."""

from __future__ import annotations

import json
import math
from importlib.resources import as_file, files

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("executorch")

from kvstore.errors import (
    CapacityError,
    InputError,
    TokensError,
)
from runtime_adapter import Model
from runtime_adapter.breakeven import FirstToken, break_even_n_tokens
from runtime_adapter.commands.bench import bench
from runtime_adapter.commands.demo import builtin_prompt
from runtime_adapter.quality import (
    BOUNDS,
    CodecMeasure,
    Drift,
    cheapest,
    measure_codecs,
    split,
)

pytestmark = pytest.mark.adapter


@pytest.fixture(scope="module")
def tiny():
    with (
        as_file(files("runtime_adapter") / "demo" / "tiny-llama.pte") as program,
        Model.open(program) as model,
    ):
        yield model


def test_an_exact_codec_changes_no_answer_and_lossy_ones_a_little(tiny, tmp_path):
    ids = builtin_prompt(256 + 41)
    names = ["exact", "half", "int8", "int4"]
    found = measure_codecs(tiny, ids, names, tmp_path, n_scored=40, n_generated=20)
    assert [one.codec for one in found] == [one.stored_as for one in found] == names
    exact, half, int8, int4 = found
    assert exact.drift.max_kl == exact.drift.max_logit_error == exact.drift.perplexity_change == 0
    assert exact.drift.top1 == exact.drift.generated_top1 == 1
    for one in (half, int8, int4):
        assert 0 < one.drift.mean_kl <= one.drift.max_kl < 1
        assert 0 < one.drift.mean_logit_error <= one.drift.max_logit_error
        assert one.drift.top1 > 0.8
        assert math.isclose(one.drift.exact_perplexity, exact.drift.perplexity)
    assert exact.stored_nbytes > half.stored_nbytes > int8.stored_nbytes > int4.stored_nbytes
    assert {(one.n_tokens, one.drift.n_scored_tokens) for one in found} == {(256, 40)}


@pytest.mark.slow
def test_what_a_codec_learns_is_learned_from_another_text_if_there_is_one(tiny, tmp_path):
    ids, calibration = builtin_prompt(256 + 41), builtin_prompt(6000)[400:1936]
    found = measure_codecs(
        *(tiny, ids, ["exact", "pca"], tmp_path),
        n_scored=40,
        n_generated=20,
        calibration=calibration,
    )
    assert [one.n_calibration_tokens for one in found] == [0, 1536]
    assert [one.bases_nbytes > 0 for one in found] == [False, True]
    exact, pca = found
    assert pca.n_fallback_blobs == 0
    assert not pca.is_in_sample
    assert pca.stored_nbytes < exact.stored_nbytes / 5
    assert pca.drift.mean_kl < 0.01


@pytest.mark.parametrize(("n_calibration", "n_learned_from"), [(100, 0), (260, 260)])
def test_a_calibration_too_short_to_learn_from_is_none(
    tiny, tmp_path, monkeypatch, n_calibration, n_learned_from
):
    monkeypatch.setattr("kvstore.training.MIN_TRAINING_N_TOKENS", 200)
    calibration = builtin_prompt(1000)[-n_calibration:]
    (pca,) = measure_codecs(
        *(tiny, builtin_prompt(256 + 11), ["pca"], tmp_path),
        n_scored=10,
        n_generated=10,
        calibration=calibration,
    )
    assert pca.bases_nbytes > 0
    assert pca.n_calibration_tokens == n_learned_from
    assert pca.is_in_sample == (not n_learned_from)


def test_a_text_is_split_if_both_parts_are_long_enough_to_learn_from():
    short, least, long = (list(range(n)) for n in (3328, 2 * 1536 + 257, 10_000))
    assert split(short) == (short, [])
    assert split(least) == (least[:-1536], least[-1536:])
    assert split(long) == (long[:-2048], long[-2048:])


def test_what_does_not_fit_is_refused(tiny, tmp_path):
    with pytest.raises(TokensError, match="more than 41 token ids"):
        measure_codecs(tiny, builtin_prompt(41), ["exact"], tmp_path, n_scored=40)
    ids = builtin_prompt(4090)
    with pytest.raises(CapacityError, match="room for"):
        measure_codecs(tiny, ids, ["exact"], tmp_path, n_scored=40, n_generated=300)
    with pytest.raises(InputError, match="codec: expected"):
        measure_codecs(tiny, builtin_prompt(300), ["int9"], tmp_path, n_scored=40)
    assert not list(tmp_path.iterdir())


def measure(codec, stored_nbytes, *, mean_kl, top1=1.0, bases_nbytes=0):
    drift = Drift(
        n_scored_tokens=1,
        perplexity=1.0,
        exact_perplexity=1.0,
        mean_kl=mean_kl,
        max_kl=mean_kl,
        mean_logit_error=0.0,
        max_logit_error=0.0,
        top1=top1,
        n_generated_tokens=1,
        generated_top1=1.0,
    )
    return CodecMeasure(
        codec=codec,
        stored_as=codec,
        n_tokens=1,
        n_fallback_blobs=0,
        raw_nbytes=100,
        stored_nbytes=stored_nbytes,
        save_s=0.0,
        restore_s=0.0,
        drift=drift,
        bases_nbytes=bases_nbytes,
    )


@pytest.mark.parametrize(
    ("bound", "expected"),
    [("exact", "exact"), ("strict", "half"), ("close", "int8"), ("loose", "int4")],
)
def test_the_cheapest_within_a_bound_is_chosen(bound, expected):
    measures = [
        measure("exact", 80, mean_kl=0.0),
        measure("half", 40, mean_kl=1e-6),
        measure("int8", 25, mean_kl=5e-4),
        measure("int4", 14, mean_kl=5e-3, top1=0.98),
        measure("int2", 7, mean_kl=5e-3, top1=0.9),
    ]
    assert cheapest(measures, bound).codec == expected
    assert list(BOUNDS) == ["exact", "strict", "close", "loose"]


def test_what_a_codec_learned_counts_too():
    measures = [
        measure("int4", 14, mean_kl=5e-4),
        measure("pca", 10, mean_kl=5e-4, bases_nbytes=5),
    ]
    assert cheapest(measures, "close").codec == "int4"


def test_no_codec_within_the_bound_and_no_such_bound_are_errors():
    with pytest.raises(InputError, match="measure 'exact' too"):
        cheapest([measure("int4", 14, mean_kl=1.0)], "loose")
    with pytest.raises(InputError, match="expected one of exact, strict"):
        cheapest([measure("exact", 14, mean_kl=0.0)], "somewhat")


@pytest.mark.parametrize(
    ("gains", "expected"),
    [([0.5, 0.9, 2, 5], 64), ([2, 0.5, 3, 4], 64), ([2, 3, 3, 3], 16), ([2, 3, 3, 0.5], None)],
)
def test_break_even_is_from_where_on_restoring_always_wins(gains, expected):
    measured = [
        FirstToken(
            n_tokens=16 << number,
            prefill_s=gain,
            restore_s=1.0,
            cold_restore_s=None,
            decode_s=0.1,
        )
        for number, gain in enumerate(gains)
    ]
    assert break_even_n_tokens(measured, is_cold=False) == expected
    assert break_even_n_tokens(measured, is_cold=True) is None


@pytest.mark.slow
def test_the_command_prints_both_tables_and_the_choice(tiny, tmp_path):
    ids, folder = tmp_path / "ids.json", tmp_path / "stores"
    ids.write_text(json.dumps(builtin_prompt(60)))
    folder.mkdir()
    arguments = ["--model", str(tiny.path), "--prompt-ids", str(ids), "--folder", str(folder)]
    arguments += ["--codecs", "exact; k=int8,v=int4", "--n-scored", "8", "--n-generate", "4"]
    arguments += ["--auto", "loose"]
    shown = CliRunner().invoke(bench, arguments)
    assert shown.exit_code == 0, shown.output
    assert "restoring wins from" in shown.output
    assert "k=int8,v=int4" in shown.output
    assert 'cheapest within "loose": ' in shown.output
    told = CliRunner().invoke(bench, [*arguments, "--json"])
    found = json.loads(told.stdout)
    assert [one["codec"] for one in found["codecs"]] == ["exact", "k=int8,v=int4"]
    assert found["codecs"][0]["drift"]["max_kl"] == 0
    assert found["auto"]["bound"] == "loose"
    assert found["first_token"][0]["n_tokens"] == 16
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "x.pte"],
        ["--prompt-ids", "x"],
        ["--data", "x"],
        ["--auto", "best"],
        ["--codecs", ";"],
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments):
    assert CliRunner().invoke(bench, arguments).exit_code == 2
