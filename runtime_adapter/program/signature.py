"""How a method is called: token ids and a position in, logits out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.errors import ProgramSignatureError

if TYPE_CHECKING:
    from runtime_adapter.pte.instructions import TensorValue
    from runtime_adapter.state.dataflow import Dataflow

_INTEGERS = frozenset({"int64", "int32"})
_FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """``method(tokens[1, n], position) -> logits``.

    ``n`` goes from 1 to ``max_n_tokens`` (1 if the program takes one token at a
    time). The position is one number, the first token's (shape ``[1]``), or with
    ``position_is_per_token`` one a token (shape ``[n]``). The logits are
    ``[1, vocab]`` of the last token, or with ``logits_are_per_token`` ``[1, n, vocab]``.
    """

    tokens_dtype: str
    max_n_tokens: int
    position_dtype: str
    position_is_per_token: bool
    logits_dtype: str
    logits_are_per_token: bool
    vocab_size: int

    def arguments(self, tokens: Sequence[int], *, start: int) -> list[tuple[str, list[Any]]]:
        """What the method takes to compute ``tokens`` from position ``start`` on.

        A dtype's name and values a tensor, those nested as its shape has it.
        """
        n_positions = len(tokens) if self.position_is_per_token else 1
        positions = list(range(start, start + n_positions))
        return [(self.tokens_dtype, [list(tokens)]), (self.position_dtype, positions)]


def read_signature(flow: Dataflow) -> Signature:
    """The signature of a method that takes token ids and a position.

    Raises:
        ProgramSignatureError: it takes or returns something else.
    """
    graph = flow.graph
    inputs = [graph.tensors.get(index) for index in graph.inputs]
    outputs = [graph.tensors.get(index) for index in graph.outputs]
    shown = ", ".join(_show(tensor) for tensor in inputs)
    if len(inputs) != 2 or inputs[0] is None or inputs[1] is None:
        raise _mismatch(graph.name, f"inputs ({shown})")
    tokens, position = inputs[0], inputs[1]
    if tokens.dtype not in _INTEGERS or len(tokens.shape) != 2 or tokens.shape[0] != 1:
        raise _mismatch(graph.name, f"inputs ({shown})")
    max_n_tokens = tokens.shape[1]
    per_token = position.is_dynamic or position.shape not in {(1,), ()}
    if position.dtype not in _INTEGERS or len(position.shape) != 1:
        raise _mismatch(graph.name, f"inputs ({shown})")
    if per_token and position.shape != (max_n_tokens,):
        raise _mismatch(graph.name, f"inputs ({shown})")
    if max_n_tokens < 1 or (not tokens.is_dynamic and max_n_tokens > 1):
        raise _mismatch(
            graph.name,
            f"exactly {max_n_tokens} tokens at every call; export it with dynamic shapes, "
            "or for one token at a time",
        )
    logits = outputs[0] if outputs else None
    if logits is None or logits.dtype not in _FLOATS or len(logits.shape) not in {2, 3}:
        raise _mismatch(graph.name, f"outputs ({', '.join(_show(tensor) for tensor in outputs)})")
    return Signature(
        tokens_dtype=tokens.dtype,
        max_n_tokens=max_n_tokens,
        position_dtype=position.dtype,
        position_is_per_token=per_token,
        logits_dtype=logits.dtype,
        logits_are_per_token=len(logits.shape) == 3,
        vocab_size=logits.shape[-1],
    )


def _show(tensor: TensorValue | None) -> str:
    return "not a tensor" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _mismatch(method: str, found: str) -> ProgramSignatureError:
    return ProgramSignatureError(
        f"method {method!r}: expected (tokens [1, n] and position [1] or [n], both integers) and "
        f"float logits [1, vocab] or [1, n, vocab], found {found}; "
        "use a text model exported with a KV cache, or choose another method"
    )
