"""Where the files that travel with the code are: migrations and schemas.

In a checkout (also one that is installed in editable mode) they lie beside the
package, at the top of the project. In a wheel they lie inside the package, so
that neither becomes an importable top-level name. Nothing else in the code
knows the difference.
"""

from __future__ import annotations

from pathlib import Path

from kvstore.errors import KVStoreError

_PACKAGE = Path(__file__).resolve().parent

# A folder counts as found only if it holds this file: a stray directory of the
# same name beside an installed package is not ours.
_MARKERS = {"migrations": "env.py", "schemas": "schema.sql"}


def migrations_dir() -> Path:
    """The folder with Alembic's ``env.py`` and ``versions/``, as an absolute path.

    Raises:
        KVStoreError: the installation is incomplete.
    """
    return _locate("migrations")


def schemas_dir() -> Path:
    """The folder with ``FORMAT.md``, ``schema.sql``, the JSON Schemas and the vectors.

    Raises:
        KVStoreError: the installation is incomplete.
    """
    return _locate("schemas")


def _locate(name: str) -> Path:
    # The wheel's own copy first: what lies beside an installed package belongs
    # to somebody else.
    candidates = (_PACKAGE / "_bundle_data" / name, _PACKAGE.parent / name)
    for candidate in candidates:
        if (candidate / _MARKERS[name]).is_file():
            return candidate
    places = " or ".join(str(candidate / _MARKERS[name]) for candidate in candidates)
    raise KVStoreError(
        f"this installation of kvstore is incomplete: expected {places}, found neither; "
        "reinstall it (pip install --force-reinstall --no-deps kvstore, "
        "or run from a complete checkout)"
    )
