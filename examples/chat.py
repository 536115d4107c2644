"""A terminal chat whose conversations survive: edit them, fork them, come back tomorrow.

    python examples/chat.py                                  # the demo's tiny model
    python examples/chat.py llama.pte --tokenizer tokenizer.json --before "<user>" --after "<bot>"

Type, and the model goes on. Ctrl-C stops it, Ctrl-D or /quit ends; /help lists the commands.
All is saved behind the generation in --db: the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import kvstore
from runtime_adapter import ByteTokenizer, Model, Sampler, Session, TextSession

HELP = """\
/regenerate      another answer to what you said last
/rewind [N]      forget the last N exchanges (1)
/edit TEXT       say TEXT instead of what you said last
/fork NAME       go on in a copy; the original stays
/switch NAME     to another conversation, or a new one
/list            the conversations in the file
/save            save now
/load            back to what was saved last
/text            all that was said
/quit            save, and end"""
STARTS = "chat.starts"  # where each thing that was said begins, in the session's metadata


class Chat:
    """Several conversations over one model, one of them current."""

    def __init__(self, model: Model, store: kvstore.Store, options: argparse.Namespace) -> None:
        self.model = model
        self.store = store
        self.options = options
        self.tokenizer: Any = ByteTokenizer()
        if options.tokenizer:
            from pytorch_tokenizers import get_tokenizer

            self.tokenizer = get_tokenizer(options.tokenizer)
        self.open: dict[str, TextSession] = {}
        self.current = self.switch(options.name)

    @property
    def session(self) -> Session:
        """The current conversation."""
        return self.current.session

    @property
    def starts(self) -> list[int]:
        """Where each thing that was said in it begins."""
        return self.session.metadata.setdefault(STARTS, [])

    def switch(self, name: str) -> TextSession:
        """The conversation ``name``: open already, stored, or new."""
        if name not in self.open:
            session = Session(self.model, self.store, name, autosave=True)
            if not session.n_tokens:
                sampler = Sampler(temperature=self.options.temperature, top_p=0.95)
                session.sampler = Sampler(**{**sampler.to_metadata(), "seed": self.options.seed})
            self.open[name] = TextSession(session, self.tokenizer)
        self.current = self.open[name]
        print(f"[{name}: {self.session.n_tokens} tokens]")
        return self.current

    def say(self, text: str) -> None:
        """Add what was typed, and let the model answer."""
        self.starts.append(self.session.n_tokens)  # saved together with what is said
        try:
            self.current.append(self.options.before + text + self.options.after)
        except BaseException:
            self.starts.pop()
            raise
        self.answer()

    def answer(self) -> None:
        """Stream the model's turn; Ctrl-C keeps what was said so far."""
        with contextlib.suppress(KeyboardInterrupt):
            for piece in self.current.generate(self.options.max_new_tokens):
                print(piece, end="", flush=True)
        print()

    def rewind(self, n_exchanges: int) -> None:
        """Forget the last things that were said, and the answers to them."""
        kept = self.starts[: max(0, len(self.starts) - n_exchanges)]
        to = self.starts[len(kept)] if len(kept) < len(self.starts) else self.session.n_tokens
        self.session.metadata[STARTS] = kept
        done = self.session.rewind(to=to)
        print(f"[{done.n_tokens} tokens; {done.n_computed_tokens} were computed again]")

    def do(self, line: str) -> None:
        """One line that was typed."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if not line.startswith("/"):
            self.say(line)
        elif command == "/regenerate":
            self.session.regenerate()
            self.answer()
        elif command == "/rewind":
            self.rewind(int(argument or 1))
        elif command == "/edit":
            self.rewind(1)
            self.say(argument)
        elif command == "/fork":
            fork = self.session.fork(argument)
            fork.metadata = {**self.session.metadata, STARTS: list(self.starts)}
            self.open[argument] = TextSession(fork, self.tokenizer)
            self.switch(argument)
        elif command == "/switch":
            self.switch(argument)
        elif command == "/list":
            for info in self.store.sessions():
                print(f"{info.name}: {info.n_tokens} tokens")
        elif command == "/save":
            saved = self.session.save()
            print(f"[saved {saved.n_tokens} tokens, {saved.n_new_tokens} of them new]")
        elif command == "/load":
            name = str(self.session.name)
            self.session.flush()
            del self.open[name]
            self.switch(name)
        elif command == "/text":
            print(self.current.text)
        else:
            print(HELP)

    def close(self) -> None:
        """Save all of them."""
        for name, chat in self.open.items():
            try:
                chat.session.close()
            except kvstore.KVStoreError as error:
                print(f"[{name} is not saved: {error}]")


def lines() -> Iterator[str]:
    """What is typed, until the end of it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  gives input() a history
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if line == "/quit":
            return
        if line:
            yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", nargs="?", type=Path, help="a .pte (default: the demo's)")
    parser.add_argument("--tokenizer", help="its tokenizer's file (default: bytes)")
    parser.add_argument("--db", type=Path, default=Path("chat.db"))
    parser.add_argument("--name", default="chat")
    parser.add_argument("--before", default="", help="text before what you say")
    parser.add_argument("--after", default="\n", help="text behind it")
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    packaged = files("runtime_adapter") / "demo" / "tiny-llama.pte"
    with (
        as_file(packaged) as demo,
        Model.open(options.program or demo) as model,
        kvstore.open(options.db) as store,
    ):
        chat = Chat(model, store, options)
        try:
            for line in lines():
                try:
                    chat.do(line)
                except (kvstore.KVStoreError, ValueError) as error:
                    print(f"[{error}]")
                except KeyboardInterrupt:
                    print("[stopped]")
        finally:
            chat.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
