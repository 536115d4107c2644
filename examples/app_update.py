"""An app ships a new model under the old file's name; the user's conversation goes on.

The words survive, the keys and values do not: they are rebuilt by the new model, and nothing
of the old one's is ever served to it.

    python examples/app_update.py [OLD.pte NEW.pte]
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.resources import as_file, files
from pathlib import Path

import kvstore
from runtime_adapter import ByteTokenizer, Model, Session, TextSession


def first_version(app: Path) -> tuple[int, ...]:
    """Yesterday: the user talks to the model that the app came with."""
    with Model.open(app / "model.pte") as model, kvstore.open(app / "chats.db") as store:
        session = Session(model, store, "chat", autosave=True)
        chat = TextSession(session, ByteTokenizer())
        chat.append("def main():\n    ")
        list(chat.generate(40))
        session.close()
        print(f"old model: {session.n_tokens} tokens, {store.sessions()[0].n_stored_tokens} stored")
        return session.tokens


def updated(app: Path, words: tuple[int, ...]) -> None:
    """Today: another model lies there under the same name."""
    with Model.open(app / "model.pte") as model, kvstore.open(app / "chats.db") as store:
        session = Session(model, store, "chat", autosave=True)
        if session.tokens != words:
            raise SystemExit("the conversation's ids did not survive")
        if session.resumed is None or session.n_cached_tokens:
            raise SystemExit("keys and values of the old model were served")
        print(f"new model: {session.n_tokens} tokens, none restored ({session.resumed.reason})")
        logits = session.logits
        with Model.open(app / "model.pte") as fresh:
            expected = fresh.forward(words, start=0)
        if not logits.allclose(expected, atol=1e-3, rtol=1e-3):
            raise SystemExit("the new model goes on differently than by itself")
        list(session.generate(20))
        session.close()
    with Model.open(app / "model.pte") as model, kvstore.open(app / "chats.db") as store:
        session = Session(model, store, "chat")
        print(f"reopened: {session.n_cached_tokens} of {session.n_tokens} tokens restored")
        if session.n_cached_tokens < session.n_tokens - 1 or not store.verify().ok:
            raise SystemExit("what the new model computed was not stored")
    print("the conversation goes on, and the next logits are the same")


def main() -> None:
    packaged = files("runtime_adapter") / "demo" / "tiny-llama.pte"
    with tempfile.TemporaryDirectory() as folder, as_file(packaged) as demo:
        app = Path(folder)
        old, new = map(Path, sys.argv[1:3]) if len(sys.argv) == 3 else (demo, None)
        shutil.copy(old, app / "model.pte")
        words = first_version(app)
        if new is not None:
            shutil.copy(new, app / "model.pte")
        else:  # the same program with one other weight: another model
            data = bytearray(demo.read_bytes())
            data[-1000] ^= 1
            (app / "model.pte").write_bytes(data)
        updated(app, words)


if __name__ == "__main__":
    main()
