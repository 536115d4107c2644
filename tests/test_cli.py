from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

import kvstore
from kvstore.cli import main
from kvstore.errors import (
    InputError,
    KVStoreError,
    NotAStoreError,
    SessionNotFoundError,
    StorePathError,
)
from tests.conftest import ROOT
from tests.fakes import BytesCache
from tests.oracle import computed, raw, save

TOKENS = list(range(100, 130))
MAIN = "from kvstore.cli import main; main(prog_name='kvstore')"


@pytest.fixture
def cli(store_path):
    """Run the command on the test's store: ``cli("ls", ...)``."""

    def run(command, *arguments, path=store_path):
        return CliRunner().invoke(main, [command, str(path), *arguments], catch_exceptions=False)

    return run


@pytest.fixture
def filled(filled_once, store_path):
    """A closed file with four sessions of two models, for one test."""
    shutil.copy(filled_once, store_path)
    return store_path


@pytest.fixture(scope="module")
def filled_once(tmp_path_factory):
    store_path = tmp_path_factory.mktemp("filled") / "sessions.db"
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="first", metadata={"raw": b"\0\xff"})
        save(store, TOKENS[:20], name="second")
        store.save_session(computed(TOKENS, weights="other"), TOKENS, name="third")
    with kvstore.open(store_path, namespace="app") as store:
        save(store, TOKENS, name="spaced")
    return store_path


def verified(path):
    with kvstore.open(path, read_only=True) as store:
        assert store.verify().problems == ()
        return {one.name: one.n_stored_tokens for one in store.sessions(all_namespaces=True)}


def test_ls_prints_a_table_on_stdout_and_the_sum_on_stderr(cli, filled):
    result = cli("ls")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["NAME", "MODEL", "CODEC", "TOKENS", "STORED", "SAVED", "(UTC)"]
    assert [line.split()[0] for line in lines[1:]] == ["app/spaced", "third", "second", "first"]
    assert str(BytesCache().fingerprint)[:12] in lines[4]
    assert "4 sessions" in result.stderr


def test_ls_as_json_is_one_object(cli, filled):
    result = cli("ls", "--json")
    listing = json.loads(result.stdout)
    assert listing["path"] == str(filled)
    assert set(listing["sessions"][0]) == {
        "name", "namespace", "model", "codec", "n_tokens", "n_stored_tokens",
        "metadata", "created_at_ms", "updated_at_ms",
    }  # fmt: skip
    assert listing["sessions"][3]["metadata"] == {"raw": "00ff"}
    assert listing["sessions"][3]["model"] == str(BytesCache().fingerprint)


def test_a_number_that_json_lacks_is_null(cli, store_path):
    with kvstore.open(store_path, chunk_n_tokens=8) as store:
        save(store, TOKENS, name="chat", metadata={"scores": [0.5, float("nan"), float("inf")]})
    listing = json.loads(cli("ls", "--json").stdout)
    assert listing["sessions"][0]["metadata"] == {"scores": [0.5, None, None]}
    verified(store_path)


def test_ls_of_an_empty_store_has_only_the_head(cli, store_path):
    kvstore.open(store_path).close()
    assert cli("ls").stdout.startswith("NAME")
    assert json.loads(cli("ls", "--json").stdout)["sessions"] == []


def test_rm_deletes_the_named_sessions(cli, filled):
    result = cli("rm", "first", "third")
    assert (result.exit_code, result.stdout) == (0, "deleted first\ndeleted third\n")
    assert set(verified(filled)) == {"second", "spaced"}


def test_rm_in_a_namespace_leaves_the_others_alone(cli, filled):
    assert cli("rm", "spaced").exit_code == SessionNotFoundError.exit_code
    assert cli("rm", "--namespace", "app", "spaced").exit_code == 0
    assert set(verified(filled)) == {"first", "second", "third"}


def test_verify_says_ok(cli, filled):
    result = cli("verify")
    assert result.exit_code == 0
    assert "ok" in result.stdout
    report = json.loads(cli("verify", "--json").stdout)
    assert (report["ok"], report["problems"], report["n_sessions"]) == (True, [], 4)


def test_verify_of_a_damaged_store_lists_the_problems_and_exits_with_1(cli, filled):
    with raw(filled) as connection:
        connection.execute("UPDATE payloads SET data = zeroblob(length(data)) WHERE id = 2")
    result = cli("verify")
    assert result.exit_code == 1
    assert "checksum" in result.stdout or "decode" in result.stdout
    report = json.loads(cli("verify", "--json").stdout)
    assert not report["ok"]
    assert len(report["problems"]) == 1


def test_prune_brings_the_file_under_a_size(cli, filled):
    result = cli("prune", "--max-bytes", "0")
    assert (result.exit_code, result.stdout[:7]) == (0, "deleted")
    assert set(verified(filled).values()) == {0}


def test_prune_of_one_model_takes_the_start_of_its_fingerprint(cli, filled):
    prefix = str(BytesCache(weights="other").fingerprint)[:8]
    assert cli("prune", "--model", prefix).exit_code == 0
    stored = verified(filled)
    assert (stored["third"], stored["first"]) == (0, 30)


@pytest.mark.parametrize("prefix", ["", "zz", "ffffffffffff"])
def test_prune_of_an_unknown_model_is_an_error_that_lists_the_known(cli, filled, prefix):
    result = cli("prune", "--model", prefix)
    assert result.exit_code == InputError.exit_code
    assert str(BytesCache().fingerprint)[:12] in result.stderr


def test_prune_older_than_takes_only_what_is(cli, filled):
    assert "deleted 0 chunks" in cli("prune", "--older-than", "1h").stdout
    with raw(filled) as connection:
        connection.execute("UPDATE chunks SET last_used_at_ms = 1")
    cli("prune", "--older-than", "1h")
    assert set(verified(filled).values()) == {0}


def test_a_dry_run_says_what_would_go_and_writes_nothing(cli, filled):
    before = filled.read_bytes()
    result = cli("prune", "--max-bytes", "0", "--dry-run")
    assert (result.exit_code, result.stdout[:12]) == (0, "would delete")
    dry = json.loads(cli("prune", "--max-bytes", "0", "--dry-run", "--json").stdout)
    assert filled.read_bytes() == before
    real = json.loads(cli("prune", "--max-bytes", "0", "--json").stdout)
    assert (dry["dry_run"], real["dry_run"]) == (True, False)
    assert (dry["n_chunks"], dry["freed_nbytes"]) == (real["n_chunks"], real["freed_nbytes"])


def test_prune_without_a_limit_is_a_wrong_command_line(cli, filled):
    assert cli("prune").exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["--max-bytes", "lots"], ["--older-than", "yesterday"], ["--older-than", "-1d"]]
)
def test_an_unreadable_limit_is_an_error(cli, filled, arguments):
    assert cli("prune", *arguments).exit_code == InputError.exit_code


@pytest.mark.parametrize("command", ["ls", "verify", "rm", "prune"])
def test_no_command_makes_a_store(cli, store_path, command):
    more = {"rm": ["a"], "prune": ["--max-bytes", "0"]}.get(command, [])
    result = cli(command, *more)
    assert result.exit_code == StorePathError.exit_code
    assert result.stdout == ""
    assert result.stderr.startswith(f"kvstore: {store_path}: ")
    assert not store_path.exists()


@pytest.mark.parametrize("command", ["ls", "verify", "rm", "prune"])
def test_a_file_that_is_not_ours_is_an_error_with_its_own_code(cli, store_path, command):
    store_path.write_text("text " * 10_000)
    more = {"rm": ["a"], "prune": ["--max-bytes", "0"]}.get(command, [])
    result = cli(command, *more)
    assert result.exit_code == NotAStoreError.exit_code
    assert "Traceback" not in result.stderr


def test_an_unknown_command_is_a_wrong_command_line():
    assert CliRunner().invoke(main, ["frobnicate"]).exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["ls", "--help"], ["prune", "-h"]])
def test_help_is_there_for_everything(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    assert "Usage" in result.stdout


@pytest.mark.parametrize("error", [KVStoreError, *KVStoreError.__subclasses__()])
def test_an_error_becomes_one_line_on_stderr_and_its_exit_code(cli, filled, monkeypatch, error):
    def fail(*_, **__):
        raise error("expected this, found that; do something")

    monkeypatch.setattr(kvstore, "open", fail)
    result = cli("ls")
    assert result.exit_code == error.exit_code
    assert result.stderr == "kvstore: expected this, found that; do something\n"


def command(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT), **options},
    )


def test_the_command_runs_in_a_process_of_its_own(filled):
    listed = command("ls", filled, "--json")
    assert listed.returncode == 0, listed.stderr
    assert len(json.loads(listed.stdout)["sessions"]) == 4
    missing = command("rm", filled, "missing")
    assert missing.returncode == SessionNotFoundError.exit_code
    assert missing.stderr.startswith("kvstore: ")


def test_a_name_that_the_terminal_cannot_print_is_escaped(store_path):
    with kvstore.open(store_path) as store:
        save(store, TOKENS, name="a ☃")
    listed = command("ls", store_path, PYTHONIOENCODING="latin-1")
    assert listed.returncode == 0, listed.stderr
    assert "a \\u2603" in listed.stdout


def test_a_reader_that_closes_the_pipe_early_is_no_error(filled):
    process = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" ls "$2" | head -n 1', sys.executable, MAIN, filled],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" not in process.stderr
    assert process.stdout.startswith("NAME")


def test_an_option_that_cannot_be_read_is_named(filled):
    for option, text in (("--max-bytes", "much"), ("--older-than", "long")):
        result = CliRunner().invoke(main, ["prune", str(filled), option, text])
        assert result.exit_code == InputError.exit_code
        assert f"{option}: expected" in result.stderr


def test_an_empty_file_is_no_store_and_stays_empty(store_path):
    store_path.write_bytes(b"")
    for command in ("ls", "verify", "rm"):
        arguments = [command, str(store_path), *(["name"] if command == "rm" else [])]
        assert CliRunner().invoke(main, arguments).exit_code == StorePathError.exit_code
    assert store_path.read_bytes() == b""


def test_an_interrupt_has_its_own_exit_code(filled, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(kvstore.Store, "verify", interrupted)
    assert CliRunner().invoke(main, ["verify", str(filled)]).exit_code == 130


def test_control_characters_of_a_name_do_not_reach_the_terminal(store_path):
    with kvstore.open(store_path) as store:
        save(store, TOKENS, name="a\x1b[2Jb\nc")
    shown = CliRunner().invoke(main, ["ls", str(store_path)]).stdout
    assert "\x1b" not in shown
    assert r"a\x1b[2Jb\nc" in shown
