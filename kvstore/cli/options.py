"""What several commands share: the STORE argument, output as JSON, a model by its prefix."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

import kvstore
from kvstore.errors import InputError, StorePathError

_Function = TypeVar("_Function", bound=Callable[..., Any])


def store_argument(function: _Function) -> _Function:
    """Add the STORE argument, as ``path``."""
    return click.argument("path", metavar="STORE", type=click.Path(path_type=Path))(function)


def json_option(function: _Function) -> _Function:
    """Add ``--json``, as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(function)


def namespace_option(function: _Function) -> _Function:
    """Add ``--namespace``."""
    return click.option("--namespace", default="", help="The application's namespace.")(function)


def open_existing(path: Path, *, read_only: bool, namespace: str = "") -> kvstore.Store:
    """The store at ``path``; a command never makes a new file.

    Raises:
        StorePathError: there is no file.
        StoreError: it cannot be opened.
    """
    try:
        is_there = path.exists() and (path.is_dir() or path.stat().st_size > 0)
    except OSError as error:
        raise StorePathError(f"{path}: cannot be looked at ({error}); check the path") from error
    if not is_there:
        raise StorePathError(
            f"{path}: expected a store, found no file, or an empty one; check the path"
        )
    return kvstore.open(path, read_only=read_only, namespace=namespace)


def print_json(value: object) -> None:
    """One JSON object on stdout; bytes become hex, and numbers that JSON lacks (NaN) null."""
    click.echo(json.dumps(_finite(value), indent=2, default=_json_default, allow_nan=False))


def find_model(store: kvstore.Store, prefix: str) -> bytes:
    """The one stored model whose fingerprint starts with ``prefix`` (hex).

    Raises:
        InputError: none does, or several do.
    """
    matching = [model for model in store.models() if str(model).startswith(prefix.lower())]
    if len(matching) != 1 or not prefix:
        known = ", ".join(str(model)[:12] for model in store.models()) or "none"
        raise InputError(
            f"expected the start of exactly one model's fingerprint, found {prefix!r} "
            f"which fits {len(matching)}; stored are: {known}"
        )
    return matching[0].model


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _json_default(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, kvstore.Fingerprint):
        return str(value)
    raise TypeError(f"not JSON: {type(value).__name__}")
