"""What a stored conversation says of itself, and what older ones did not say."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("executorch")

from kvstore import Edit
from kvstore.errors import InputError
from runtime_adapter import Sampler
from runtime_adapter.session.conversation import Conversation
from runtime_adapter.session.state import STATE_KEY, pack_state, unpack_state

pytestmark = pytest.mark.adapter

EDITS = (Edit(3, bytes(32)), Edit(5, b""))


def packed(conversation, *, n_stored_tokens):
    state = pack_state(conversation, Sampler(), n_stored_tokens=n_stored_tokens, logits={})
    return {"mine": 1, STATE_KEY: state}


def test_a_conversation_comes_back_with_its_edits():
    metadata = packed(Conversation(tokens=list(range(8)), edits=EDITS), n_stored_tokens=6)
    conversation, _, rest = unpack_state(metadata, list(range(6)), ())
    assert (conversation.tokens, conversation.edits) == (list(range(8)), EDITS)
    assert rest == {"mine": 1}


def test_one_that_was_stored_before_there_were_edits_has_those_that_were_restored():
    metadata = packed(Conversation(tokens=list(range(8))), n_stored_tokens=8)
    del metadata[STATE_KEY]["edits"]
    conversation, _, _ = unpack_state(metadata, list(range(8)), ())
    assert (conversation.tokens, conversation.edits) == (list(range(8)), ())


def test_what_was_saved_without_a_session_has_the_edits_that_were_restored():
    conversation, _, _ = unpack_state({}, list(range(8)), EDITS)
    assert conversation.edits == EDITS


@pytest.mark.parametrize("edits", [5, [5], [[3, b"short"]], [[3, bytes(32)], [2, bytes(32)]]])
def test_edits_that_are_none_are_refused(edits):
    metadata = packed(Conversation(tokens=list(range(8))), n_stored_tokens=8)
    metadata[STATE_KEY]["edits"] = edits
    with pytest.raises(InputError):
        unpack_state(metadata, list(range(8)), ())
