"""The restores that are compared: kvstore by codec, and the peers, from files of the same cache."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import measure
import numpy as np
import peers
from measure import Contender
from synthetic import SyntheticCache, llama_1b_layout, random_ids, trained_values

import kvstore
from kvstore import codec
from kvstore.errors import InputError

SHAPE = "Llama-3.2-1B's shape (16 layers, 8 KV heads of 64)"


@dataclass(slots=True, kw_only=True)
class Contest:
    """Saved once by each; ``contenders`` restore, by name. ``absent`` says who cannot, and why."""

    raw_nbytes: int
    contenders: dict[str, Contender] = field(default_factory=dict)
    file_nbytes: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of scripts that compare kvstore's codecs with the peers."""
    add_codecs(parser)
    parser.add_argument("--peers", nargs="*", default=peers.NAMES, choices=peers.NAMES)
    parser.add_argument(
        "--normal",
        action="store_true",
        help="fill the caches with normally distributed numbers, not with a trained model's",
    )


def add_codecs(parser: argparse.ArgumentParser) -> None:
    """The option that names codecs."""
    parser.add_argument(
        "--codecs",
        nargs="+",
        default=list(codec.NAMES),
        help="names for kvstore.open(codec=...); all that there are by default",
    )


def content(arguments: argparse.Namespace) -> tuple[np.ndarray | None, str]:
    """What the caches are to be filled with: values (None: normal ones), and in words."""
    values = None if arguments.normal else trained_values()
    if values is not None:
        return values, "the demo model's trained K and V, none twice within a chunk"
    return None, "normally distributed numbers"


def open_stores(
    stack: ExitStack, folder: Path, codecs: Sequence[str], *, mapped: Collection[str] = ()
) -> tuple[dict[str, kvstore.Store], dict[str, str]]:
    """A store for each codec, by "kvstore NAME"; and those not offered, with the reason.

    For the codecs in ``mapped`` one more, with ``mmap=True``.
    """
    _use_torch()
    stores, absent = {}, {}
    for name in codecs:
        for mmap in (False, True) if name in mapped else (False,):
            who = f"kvstore {name}" + (", mapped" if mmap else "")
            try:
                store = kvstore.open(folder / f"{_slug(who)}.db", codec=name, mmap=mmap)
            except InputError as error:
                absent[who] = f"not offered: {error}"
            else:
                stores[who] = stack.enter_context(store)
    return stores, absent


def _use_torch() -> None:
    """What ``Model.open`` does: lossy codecs compute in torch, where it is installed."""
    if importlib.util.find_spec("torch") is not None:
        from runtime_adapter.runtime.kernels import TorchKernels

        kvstore.use_kernels(TorchKernels())


@contextmanager
def contest(
    dtype: str,
    *,
    n_tokens: int,
    codecs: Sequence[str],
    peer_names: Sequence[str],
    values: np.ndarray | None,
    mapped: Collection[str] = (),
) -> Iterator[Contest]:
    """One cache, saved by every codec and peer; files are in the page cache."""
    layout = llama_1b_layout(capacity_n_tokens=n_tokens, dtype=dtype)
    cache, ids = SyntheticCache(layout, values=values), random_ids(n_tokens)
    cache.extend(ids)
    target = SyntheticCache(layout)  # filled: none of its pages is new
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=measure.scratch())))
        found = Contest(raw_nbytes=sum(memory.nbytes for memory in cache.memory))
        stores, found.absent = open_stores(stack, folder, codecs, mapped=mapped)
        for label, store in stores.items():
            saved = store.save_session(cache, ids)
            found.file_nbytes[label] = saved.stored_nbytes
            found.contenders[label] = Contender(
                run=_loading(store, target, ids), before=_emptying(target)
            )
        for name in peer_names:
            reason = peers.not_installed(name)
            if reason is not None:
                found.absent[name] = reason
                continue
            peer = peers.make(name, cache, n_tokens=n_tokens, dtype=dtype)
            stack.callback(peer.close)
            path = folder / f"{_slug(name)}.peer"
            peer.save(path)
            found.file_nbytes[name] = path.stat().st_size
            found.contenders[name] = Contender(run=_restoring(peer, path))
        found.contenders["memcpy"] = Contender(run=_copying(cache, target))
        yield found


def _loading(store: kvstore.Store, target: SyntheticCache, ids: list[int]) -> Callable[[], object]:
    def load() -> None:
        hit = store.load_session(target, [*ids, 0])  # one more, so that all of ids is restored
        if hit.n_tokens != len(ids):
            raise SystemExit(f"restored {hit.n_tokens} of {len(ids)} tokens: {hit.detail}")

    return load


def _emptying(target: SyntheticCache) -> Callable[[], object]:
    return lambda: target.truncate(0)


def _restoring(peer: peers.Peer, path: Path) -> Callable[[], object]:
    return lambda: peer.restore(path)


def _copying(source: SyntheticCache, target: SyntheticCache) -> Callable[[], object]:
    def copy() -> None:
        for one, other in zip(source.memory, target.memory, strict=True):
            np.copyto(other, one)

    return copy


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
