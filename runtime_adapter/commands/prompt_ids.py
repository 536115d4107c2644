"""Token ids from a file, as ``kvstore demo --prompt-ids`` takes them."""

from __future__ import annotations

import json
from pathlib import Path

from kvstore.errors import TokensError

_MAX_IDS_NBYTES = 64 << 20


def read_prompt_ids(path: Path) -> list[int]:
    """Token ids from a file: a JSON list, or whole numbers between spaces, lines or commas.

    Raises:
        TokensError: the file cannot be read, is empty, or holds something else.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_IDS_NBYTES + 1)
    except OSError as error:
        raise TokensError(
            f"{path}: expected a file of token ids, found: {error.strerror}; check the path"
        ) from error
    form = "expected a JSON list such as [1, 2, 3], or numbers between spaces or commas"
    if len(data) > _MAX_IDS_NBYTES:
        raise TokensError(f"{path}: {form}, found more than {_MAX_IDS_NBYTES} bytes")
    try:
        text = data.decode("utf-8-sig").strip()
        if text.startswith(("[", "{", '"')):
            found = json.loads(text)
        else:
            found = [
                int(word) if word.isascii() else word for word in text.replace(",", " ").split()
            ]
    except (ValueError, RecursionError) as error:
        raise TokensError(f"{path}: {form}, found something else ({error})") from error
    if not isinstance(found, list):
        raise TokensError(f"{path}: {form}, found a JSON {type(found).__name__}")
    if not found:
        raise TokensError(f"{path}: {form}, found no token ids")
    for index, token in enumerate(found):
        if type(token) is not int or token < 0:
            raise TokensError(
                f"{path}: expected whole numbers of at least 0, found {token!r} at index {index}"
            )
    return found
