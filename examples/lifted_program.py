"""Store the cache of a program that takes it as inputs and returns it, as older exports do.

The caller holds the tensors: what a step returns takes the place of what went in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from executorch.exir import to_edge
from executorch.runtime import Runtime

import kvstore
from runtime_adapter import TensorCache, fingerprint_of

N_SLOTS, N_HEADS, HEAD_DIM, VOCAB = 64, 2, 8, 32
TOKENS = [(7 * position) % VOCAB for position in range(20)]


class Lifted(torch.nn.Module):
    """One attention layer; ``forward(token [1], position [1], k, v)`` gives ``(logits, k, v)``."""

    def __init__(self) -> None:
        super().__init__()
        width = N_HEADS * HEAD_DIM
        self.embedding = torch.nn.Embedding(VOCAB, width)
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.head = torch.nn.Linear(width, VOCAB)

    def forward(
        self, token: torch.Tensor, position: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``k`` and ``v`` are ``[1, n_slots, n_heads, head_dim]``."""
        hidden = self.embedding(token)
        q, new_k, new_v = self.qkv(hidden).view(3, 1, N_HEADS, HEAD_DIM)
        is_here = (torch.arange(N_SLOTS) == position).view(1, N_SLOTS, 1, 1)
        k, v = torch.where(is_here, new_k, k), torch.where(is_here, new_v, v)
        scores = (q.unsqueeze(1) * k).sum(-1)  # [1, n_slots, n_heads]
        is_future = (torch.arange(N_SLOTS) > position).view(1, N_SLOTS, 1)
        weights = torch.softmax(scores.masked_fill(is_future, float("-inf")), dim=1)
        mixed = (weights.unsqueeze(-1) * v).sum(1).view(1, -1)
        return self.head(hidden + mixed), k, v


def export(path: Path) -> None:
    torch.manual_seed(0)
    state = torch.zeros(1, N_SLOTS, N_HEADS, HEAD_DIM)
    inputs = (torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), state, state)
    program = to_edge(torch.export.export(Lifted().eval(), inputs)).to_executorch()
    with path.open("wb") as stream:
        program.write_to_file(stream)


def open_program(path: Path) -> tuple[Any, TensorCache]:
    method = Runtime.get().load_program(path).load_method("forward")
    state = {
        name: torch.zeros(1, N_SLOTS, N_HEADS, HEAD_DIM) for name in ("layers.0.k", "layers.0.v")
    }
    # The file holds the weights and the instructions.
    fingerprint = fingerprint_of(path, program=path)
    return method, TensorCache.from_tensors(state, token_axis=1, fingerprint=fingerprint)


def forward(method: Any, cache: TensorCache, tokens: list[int]) -> torch.Tensor:
    logits = torch.empty(0)
    for token in tokens:
        inputs = [
            torch.tensor([token]),
            torch.tensor([cache.n_tokens]),
            *(view.tensor for view in cache.values()),
        ]
        logits, k, v = method.execute(inputs)
        cache.replace({"layers.0.k": k, "layers.0.v": v})
        cache.extend([token])
    return logits


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        program, path = Path(folder) / "lifted.pte", Path(folder) / "sessions.db"
        export(program)
        method, cache = open_program(program)
        forward(method, cache, TOKENS[:15])
        with kvstore.open(path) as store:
            store.save_session(cache, cache.tokens, name="chat")
        expected = forward(method, cache, TOKENS[15:])

        method, cache = open_program(program)  # as another process would
        with kvstore.open(path) as store:
            hit = store.load_session(cache, TOKENS)
        found = forward(method, cache, TOKENS[hit.n_tokens :])
    if not torch.equal(found, expected):
        raise SystemExit("the logits differ")
    print(f"restored {hit.n_tokens} of {len(TOKENS)} tokens; the next logits are the same")


if __name__ == "__main__":
    main()
