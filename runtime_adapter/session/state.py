"""What of a conversation is stored beside its tokens: one map in the session's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore import Edit, Lineage, lineage_of
from kvstore.errors import InputError
from runtime_adapter.session.conversation import Conversation
from runtime_adapter.session.cuts import Cuts
from runtime_adapter.session.sampler import Sampler

if TYPE_CHECKING:
    import torch

STATE_KEY = "runtime_adapter.session"
"""The key in a stored session's metadata; the application's own keys lie beside it."""

_VERSION = 1
_MAX_LOGITS_NBYTES = 768 << 10  # of the 1 MiB that a session's metadata may take


def pack_state(
    conversation: Conversation,
    sampler: Sampler,
    *,
    n_stored_tokens: int,
    logits: Mapping[int, torch.Tensor],
) -> dict[str, Any]:
    """All but the first ``n_stored_tokens`` ids, as plain types; the newest logits that fit."""
    cuts = conversation.cuts.copy()
    cuts.forget_after(n_stored_tokens)
    stored: dict[str, bytes] = {}
    left_nbytes = _MAX_LOGITS_NBYTES
    for position in sorted(logits, reverse=True):
        raw = logits[position].numpy().astype("<f4").tobytes()
        left_nbytes -= len(raw)
        if left_nbytes < 0:
            break
        stored[str(position)] = raw
    return {
        "version": _VERSION,
        "pending": conversation.tokens[n_stored_tokens:],
        "cuts": cuts.to_runs(),
        "edits": [[edit.start, edit.digest] for edit in conversation.edits],
        "turns": [list(turn) for turn in conversation.turns],
        "sampler": sampler.to_metadata(),
        "logits": stored,
    }


def unpack_state(
    metadata: Mapping[str, Any], stored: list[int], edits: Lineage
) -> tuple[Conversation, Sampler, dict[str, Any]]:
    """The conversation whose ``stored`` ids came with ``metadata``, and the rest of that.

    ``edits`` are those of what was restored; they count if the metadata has no word of its own.

    Raises:
        InputError: the map under ``STATE_KEY`` is not what ``pack_state`` gives.
    """
    rest = {key: value for key, value in metadata.items() if key != STATE_KEY}
    if STATE_KEY not in metadata:  # saved by itself, not by a session
        return Conversation(tokens=stored, edits=edits), Sampler(), rest
    data = metadata[STATE_KEY]
    try:
        if data["version"] != _VERSION:
            raise InputError(
                f"expected a conversation of version {_VERSION}, found {data['version']!r}; "
                "update kvstore"
            )
        tokens = stored + [_id(token) for token in data["pending"]]
        conversation = Conversation(
            tokens=tokens,
            cuts=Cuts.from_runs(data["cuts"], n_tokens=len(stored)),
            turns=[_turn(turn, n_tokens=len(tokens)) for turn in data["turns"]],
            edits=lineage_of(Edit(*one) for one in data["edits"]) if "edits" in data else edits,
            logits={int(position): _floats(raw) for position, raw in data["logits"].items()},
        )
        return conversation, Sampler.from_metadata(data["sampler"]), rest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"expected what a Session stored of a conversation, found {error!r}"
        ) from error


def _id(token: Any) -> int:
    if type(token) is not int or token < 0:
        raise ValueError(f"token id {token!r}")
    return token


def _turn(turn: Any, *, n_tokens: int) -> tuple[int, int]:
    start, stop = map(_id, turn)
    if not start < stop <= n_tokens:
        raise ValueError(f"turn {turn!r} of {n_tokens} tokens")
    return start, stop


def _floats(raw: Any) -> Any:
    import torch

    return torch.from_numpy(np.frombuffer(raw, dtype="<f4").astype(np.float32))
