"""The operator libraries that a program needs: found in the wheel, loaded, and named if missing.

ExecuTorch keeps the operators of language models (``llama::*``) and of
quantized models (``quantized_decomposed::*``) in libraries of their own. Their
Python packages import the whole exporter (about 4 s); loading the shared library
registers the same kernels in milliseconds.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime_adapter.runtime import method


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorLibrary:
    """One shared library of the ``executorch`` package, and the namespaces it registers."""

    folder: str
    stem: str
    namespaces: frozenset[str]

    def find(self) -> Path | None:
        """The library's file in the installed package, or None."""
        # find_spec does not import: executorch is a namespace package, maybe over several roots.
        spec = importlib.util.find_spec("executorch")
        roots = (spec.submodule_search_locations or ()) if spec else ()
        for root in roots:
            for suffix in (".so", ".dylib", ".dll"):
                path = Path(root, *self.folder.split("/"), self.stem + suffix)
                if path.is_file():
                    return path
        return None


LIBRARIES = (
    OperatorLibrary(
        folder="extension/llm/custom_ops",
        stem="libcustom_ops_aot_lib",
        namespaces=frozenset({"llama"}),
    ),
    OperatorLibrary(
        folder="kernels/quantized",
        stem="libquantized_ops_aot_lib",
        namespaces=frozenset({"quantized_decomposed"}),
    ),
)
"""The libraries that the ``executorch`` wheel carries (1.4.1 and 1.5.1)."""


def ensure_operators(operators: Iterable[str]) -> None:
    """Load what registers ``operators`` (names such as ``llama::update_cache.out``).

    Operators that are registered already, by the runtime itself or by a library
    that the application loaded, are left alone, so nothing is registered twice.

    Raises:
        MissingOperatorError: an operator is in no library that was found.
        RuntimeMissingError: ExecuTorch is not installed.
    """
    needed = frozenset(operators)
    missing = needed - method.registered_operators()
    if not missing:
        return
    notes = _load_libraries(missing)
    missing = needed - method.registered_operators()
    if missing:
        raise method.missing_operators_error(missing, notes=notes)


def operator_schema(operator: str) -> tuple[str, ...] | None:
    """The types of an operator's arguments (``SchemaOf``); loads the library that has it.

    Raises:
        RuntimeMissingError: ExecuTorch is not installed.
    """
    types = method.argument_types(operator)
    if types is None:
        _load_libraries({operator} - method.registered_operators())
        types = method.argument_types(operator)
    return types


def _load_libraries(missing: Collection[str]) -> list[str]:
    """Load the libraries that have operators of these namespaces; says what did not work."""
    namespaces = {name.partition("::")[0] for name in missing}
    notes = []
    for library in LIBRARIES:
        if not namespaces & library.namespaces:
            continue
        path = library.find()
        if path is None:
            notes.append(f"{library.stem} is not in the installed executorch package")
            continue
        try:
            method.load_library(path)
        except OSError as error:
            notes.append(f"{path.name} does not load: {error}")
    return notes
