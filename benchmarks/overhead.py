"""What a store costs that is not bytes: opening it, finding a prefix, planning.

    python benchmarks/overhead.py [--n-sessions 10000]

A store of 10,000 named sessions that share a system prompt and then differ; their caches have
16 bytes a token, so that bytes do not count. The peer of a look-up is what llama-server's prompt
cache does: compare the prompt with each of the sessions' tokens, held in memory. Needs no
ExecuTorch.
"""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import numpy as np
from measure import ROOT, Column, Contender, Result, interleaved
from synthetic import SyntheticCache, llama_1b_layout, random_ids, tiny_layout

import kvstore

LIMIT_SECONDS = 0.010
_SYSTEM_N_TOKENS = 300
_SESSION_N_TOKENS = 600
_LONG_N_TOKENS = 4096
_COLUMNS = (Column("what", "what"), Column("seconds", "ms", "ms"))


def main() -> None:
    """One line for each thing that is not bytes."""
    parser = measure.arguments_parser(__doc__)
    parser.add_argument("--n-sessions", type=int)
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    n_sessions = arguments.n_sessions or (2_000 if arguments.quick else 10_000)
    n_rounds = arguments.rounds or (15 if arguments.quick else 50)
    measure.confine()
    result = Result(
        name="overhead",
        question="What does a store cost that is not bytes?",
        method=(
            f"A store of {n_sessions:,} named sessions of {_SESSION_N_TOKENS} tokens, the first "
            f"{_SYSTEM_N_TOKENS} of them shared, at 16 bytes a token; and one session of "
            f"{_LONG_N_TOKENS:,} tokens in Llama-3.2-1B's shape. {n_rounds} interleaved rounds."
        ),
    )
    with TemporaryDirectory(dir=measure.scratch()) as folder:
        path = Path(folder) / "sessions.db"
        sessions = [tokens_of(index) for index in range(n_sessions)]
        shutil.copyfile(filled(sessions), path)
        took = measure_all(path, sessions, n_rounds)
    table = result.table(f"{n_sessions:,} sessions", *_COLUMNS)
    for what, seconds in took.items():
        table.add(what=what, seconds=seconds)
        if not what.startswith("peer"):
            result.target(
                f"{what}: under 10 ms",
                LIMIT_SECONDS / seconds.median,
                1.0,
                found=f"{seconds.median * 1e3:.1f} ms",
            )
    measure.finish(result, arguments.json)


def tokens_of(index: int) -> list[int]:
    """The tokens of one session."""
    own = random_ids(_SESSION_N_TOKENS - _SYSTEM_N_TOKENS, seed=2 + index)
    return random_ids(_SYSTEM_N_TOKENS, seed=1) + own


def filled(sessions: list[list[int]]) -> Path:
    """A store with all sessions; made once for a file format and this script, and kept."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update((ROOT / "schemas" / "schema.sql").read_bytes())
    target = measure.scratch() / f"overhead-{len(sessions)}-{digest.hexdigest()[:12]}.db"
    if target.exists():
        return target
    print(f"saving {len(sessions):,} sessions, once; this takes a minute or so", flush=True)
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    fill(sessions, partial).replace(target)
    return target


def fill(sessions: list[list[int]], path: Path) -> Path:
    """Save all sessions, and the long one, into a new store at ``path``."""
    cache = SyntheticCache(tiny_layout(capacity_n_tokens=_SESSION_N_TOKENS))
    with kvstore.open(path) as store:
        for index, tokens in enumerate(sessions):
            cache.truncate(0)
            cache.extend(tokens)
            store.save_session(cache, tokens, name=f"chat-{index}")
        long = _long_cache()
        store.save_session(long, long.tokens, name="long")
    return path


def measure_all(path: Path, sessions: list[list[int]], n_rounds: int) -> dict[str, measure.Spread]:
    """Seconds by what is done."""
    generator = random.Random(3)  # not for security
    arrays = [np.array(session, np.uint32) for session in sessions]
    tiny = SyntheticCache(tiny_layout(capacity_n_tokens=_SESSION_N_TOKENS))
    long = _long_cache()
    prompt: list[int] = []

    def choose() -> None:
        prompt[:] = generator.choice(sessions)[: _SESSION_N_TOKENS - 20] + random_ids(20)
        tiny.truncate(0)

    def find(n_tokens: int) -> None:
        hit = store.load_session(tiny, prompt)
        if hit.n_tokens != n_tokens:
            raise SystemExit(f"found {hit.n_tokens} of {n_tokens} tokens: {hit.detail}")

    def scan() -> int:
        wanted = np.array(prompt, np.uint32)
        best = 0
        for array in arrays:
            n_tokens = min(len(array), len(wanted))
            differ = array[:n_tokens] != wanted[:n_tokens]
            best = max(best, int(differ.argmax()) if differ.any() else n_tokens)
        return best

    def miss() -> None:
        prompt[:] = random_ids(_SESSION_N_TOKENS, seed=10**6)
        tiny.truncate(0)

    def open_and_close() -> None:
        kvstore.open(path).close()

    with kvstore.open(path) as store:
        # One token more than is live, since a load leaves the last one to be computed.
        live = [*long.tokens, 0]
        store.load_session(long, live)
        contenders = {
            "open and close the store": Contender(run=open_and_close),
            "the longest stored prefix of a prompt, restored": Contender(
                before=choose, run=lambda: find(_SESSION_N_TOKENS - 20)
            ),
            "a prompt that nothing matches": Contender(before=miss, run=lambda: find(0)),
            "plan a load of 4,096 tokens that are live already": Contender(
                run=lambda: store.load_session(long, live)
            ),
            "plan a save of 4,096 tokens that are stored already": Contender(
                run=lambda: store.save_session(long, long.tokens)
            ),
            "peer: compare with each session's tokens in memory": Contender(
                before=choose, run=scan
            ),
        }
        return interleaved(contenders, n_rounds=n_rounds, n_warmups=3)


def _long_cache() -> SyntheticCache:
    cache = SyntheticCache(llama_1b_layout(capacity_n_tokens=_LONG_N_TOKENS))
    cache.extend(random_ids(_LONG_N_TOKENS, seed=0))
    return cache


if __name__ == "__main__":
    main()
