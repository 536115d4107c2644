"""Conversations in text, over real tokenizers and the model of the demo."""

from __future__ import annotations

import itertools
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("executorch")

from kvstore.errors import InputError, TokensError  # noqa: E402  after the check
from runtime_adapter import ByteTokenizer, Model, Sampler, Session, TextSession  # noqa: E402

pytestmark = pytest.mark.adapter

PROGRAM = str(files("runtime_adapter") / "demo" / "tiny-llama.pte")
SPOKEN = "def größe(self) -> int:\n    # 你好 🎉 e\u0301\n"


@pytest.fixture(scope="module")
def model():
    with Model.open(PROGRAM) as model:
        yield model


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A byte-level BPE of 264 ids, through ``pytorch_tokenizers``."""
    pytorch_tokenizers = pytest.importorskip("pytorch_tokenizers")
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=264,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin_of_text|>", "<|endoftext|>"],
        show_progress=False,
    )
    made.train_from_iterator(["the self then return def self.the"] * 50, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return pytorch_tokenizers.get_tokenizer(str(path))


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else request.getfixturevalue("bpe")


class Spoken:
    """A session whose model says ``tokens``, whatever it is asked."""

    def __init__(self, tokens):
        self.tokens = (0,)
        self._says = tokens

    def generate(self, max_new_tokens, *, sampler, stop):  # noqa: ARG002  as a session's
        for token in self._says:
            yield token
            if token in stop:
                return


def test_it_hears_and_speaks_and_keeps_the_ids(model, tokenizer):
    chat = TextSession(Session(model), tokenizer)
    chat.append("def open(self):")
    heard = chat.session.tokens
    assert chat.text.endswith("def open(self):")
    said = "".join(chat.generate(40, sampler=Sampler(temperature=0.8, seed=1)))
    assert len(chat.session.tokens) == len(heard) + 40
    assert chat.text == tokenizer.decode(list(heard)) + said
    generated = chat.session.tokens
    chat.append("\n")
    assert chat.session.tokens[: len(generated)] == generated


def test_only_the_first_text_begins_with_the_begin_token(model):
    chat = TextSession(Session(model), ByteTokenizer())
    chat.append("a")
    chat.append("b")
    assert chat.session.tokens == (256, 97, 98)
    assert chat.text == "ab"


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40))
def test_what_is_streamed_is_the_text_in_whole_characters(bpe, text):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text + SPOKEN, bos=False, eos=False)
        pieces = list(TextSession(Spoken(ids), tokenizer).generate())
        assert "".join(pieces) == text + SPOKEN
        for piece in pieces:
            assert piece
            assert piece.encode().decode() == piece


def test_a_piece_waits_for_the_rest_of_its_character():
    ids = [*"a🎉b".encode()]
    assert list(TextSession(Spoken(ids), ByteTokenizer()).generate()) == ["a", "🎉", "b"]
    # Cut off within one: what is there cannot be said.
    assert list(TextSession(Spoken(ids[:3]), ByteTokenizer()).generate()) == ["a", "\ufffd"]


def test_the_end_token_ends_the_turn_and_has_no_text(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        eos = tokenizer.eos_id
        ids = [*tokenizer.encode("the end", bos=False, eos=False), eos, 65]
        assert "".join(TextSession(Spoken(ids), tokenizer).generate()) == "the end"
        first = ids[0]
        assert "".join(TextSession(Spoken(ids), tokenizer).generate(stop=[first])) == ""


def test_breaking_off_a_stream_keeps_what_was_chosen(model):
    chat = TextSession(Session(model), ByteTokenizer())
    chat.append("import os\n")
    n_tokens = chat.session.n_tokens
    stream = chat.generate(50)
    said = "".join(itertools.islice(stream, 5))
    stream.close()
    assert chat.text == "import os\n" + said
    assert chat.session.n_tokens == n_tokens + 5


def test_what_is_no_text_or_no_tokenizer_is_refused(model):
    with pytest.raises(InputError, match="expected a tokenizer"):
        TextSession(Session(model), object())
    chat = TextSession(Session(model), ByteTokenizer())
    with pytest.raises(InputError, match="expected text"):
        chat.append(b"bytes")
    chat.append("a")
    with pytest.raises(TokensError):
        chat.append("")
