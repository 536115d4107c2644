"""A conversation in text: what was generated stays token ids, and is never encoded again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from kvstore.errors import InputError
from runtime_adapter.session.follower import SessionResult
from runtime_adapter.session.sampler import Sampler
from runtime_adapter.session.session import Session

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_N_TOKENS = 8


class Tokenizer(Protocol):
    """What the classes of ``pytorch_tokenizers`` have in common."""

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, with the begin and end token if asked for."""
        ...

    def decode(self, t: list[int]) -> str:
        """The text of ids; bytes that are no whole character become U+FFFD."""
        ...


class ByteTokenizer:
    """One token a byte of UTF-8, then begin and end: what the demo's model speaks."""

    bos_id = 256
    eos_id = 257

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """The bytes of ``s``."""
        return [*([self.bos_id] if bos else []), *s.encode(), *([self.eos_id] if eos else [])]

    def decode(self, t: Sequence[int]) -> str:
        """The text of the bytes in ``t``; other tokens have none."""
        return bytes(token for token in t if token < self.bos_id).decode(errors="replace")


class TextSession:
    """A ``Session`` that hears and speaks text.

    Its tokens are the truth: what the model generated is kept as the ids that it chose, which
    encoding its text again need not give.
    """

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        """Speak through ``tokenizer``.

        Raises:
            InputError: it is no tokenizer.
        """
        if not all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode")):
            raise InputError(
                f"TextSession: expected a tokenizer with encode and decode, found "
                f"{type(tokenizer).__name__}; pytorch_tokenizers.get_tokenizer(path) gives one"
            )
        self._session = session
        self._tokenizer = tokenizer

    @property
    def session(self) -> Session:
        """The conversation itself: to rewind, to fork, to save."""
        return self._session

    @property
    def text(self) -> str:
        """All that was said."""
        return self._tokenizer.decode(list(self._session.tokens))

    def append(self, text: str) -> SessionResult:
        """Add ``text``; the first one begins with the tokenizer's begin token.

        Raises:
            CapacityError: the cache has no room for it; nothing was added.
            InputError: it is no text.
            ProgramError: the runtime stopped; nothing was added.
            TokensError: the text has no tokens, or some that the model does not know.
        """
        if not isinstance(text, str):
            raise InputError(f"append: expected text, found {type(text).__name__}")
        is_first = not self._session.n_tokens
        return self._session.append(self._tokenizer.encode(text, bos=is_first, eos=False))

    def generate(
        self,
        max_new_tokens: int | None = None,
        *,
        sampler: Sampler | None = None,
        stop: Iterable[int] | None = None,
    ) -> Iterator[str]:
        """Yield the new text as it is generated, whole characters only; see ``Session.generate``.

        ``stop`` are token ids, by default the tokenizer's end token; they have no text.

        Raises:
            As ``Session.generate``.
        """
        try:
            stops = self._stops() if stop is None else frozenset(stop)
        except TypeError as error:
            raise InputError(
                f"generate: expected token ids as stop, found {type(stop).__name__}"
            ) from error
        tokens = self._session.generate(max_new_tokens, sampler=sampler, stop=stops)
        return self._stream(tokens, stops)

    def _stops(self) -> frozenset[int]:
        eos: Any = getattr(self._tokenizer, "eos_id", None)
        return frozenset() if eos is None else frozenset({int(eos)})

    def _stream(self, tokens: Iterator[int], stops: frozenset[int]) -> Iterator[str]:
        # Decoding starts a little before: some tokenizers drop a leading space, and the first
        # token may complete a character.
        heard: list[int] = list(self._session.tokens[-_CONTEXT_N_TOKENS:])
        told = self._tokenizer.decode(heard).rstrip(_INCOMPLETE)
        n_told = len(heard)
        for token in tokens:
            if token in stops:
                break
            heard.append(token)
            text = self._tokenizer.decode(heard)
            if len(text) > len(told) and not text.endswith(_INCOMPLETE):
                yield text[len(told) :]
                heard, n_told = heard[n_told:], len(heard) - n_told
                told = self._tokenizer.decode(heard)
        rest = self._tokenizer.decode(heard)[len(told) :]
        if rest:  # ended within a character
            yield rest
