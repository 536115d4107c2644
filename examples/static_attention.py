"""Store the caches of static attention (NPU exports), which its I/O manager holds.

The manager makes new tensors at every step. With style ``smart_mask`` position ``p`` lies in slot
``p``, or ``p`` modulo the cache's length in a sliding-window layer; ``shift_pointer`` moves
everything at every step, so nothing of it can be kept.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from executorch.examples.models.llama.llama_transformer import construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs
from executorch.examples.models.llama.static_attention import (
    StaticAttentionIOManager,
    transform_attention_mha_to_static_attention,
)

import kvstore
from kvstore import Kind
from runtime_adapter import TensorCache, fingerprint_of, tensor_spec

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "hidden_dim": 64,
    "max_seq_len": 96,
    "max_context_len": 96,
    "generate_full_logits": True,
}
CACHE_LENS = [16, 64]  # layer 0 sees the last 16 tokens, layer 1 all
INPUT_LEN = 5
TOKENS = [(7 * position) % 96 for position in range(45)]


class Chat:
    """A model, its I/O manager, and a cache over the manager's tensors."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = construct_transformer(ModelArgs(**PARAMS)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        self.model = transform_attention_mha_to_static_attention(model, split_mha=False).eval()
        config = ModelArgs(**PARAMS, attention_type="static_mha")
        self.manager = StaticAttentionIOManager(config, INPUT_LEN, CACHE_LENS, style="smart_mask")
        tensors = self.tensors()
        self.cache = TensorCache(
            tensors,
            specs=[self.spec(name, tensor) for name, tensor in tensors.items()],
            fingerprint=fingerprint_of(
                dict(model.named_parameters()), program=json.dumps([PARAMS, CACHE_LENS, INPUT_LEN])
            ),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """The manager's tensors now, ``[1, n_kv_heads, n_slots, head_dim]``."""
        return {
            f"layers.{layer}.{role}": caches[f"l{layer},h0"]
            for layer in range(len(CACHE_LENS))
            for role, caches in (("k", self.manager.k_caches), ("v", self.manager.v_caches))
        }

    def spec(self, name: str, tensor: torch.Tensor) -> Any:
        """A layer with a short cache is a ring: its slots are used again."""
        n_slots = tensor.shape[2]
        if n_slots == max(CACHE_LENS):
            return tensor_spec(name, tensor, token_axis=2)
        return tensor_spec(name, tensor, token_axis=2, kind=Kind.WINDOW, window_n_tokens=n_slots)

    def forward(self, tokens: list[int]) -> torch.Tensor:
        """Compute ``tokens`` behind what is held; the logits of the last one."""
        with torch.no_grad():
            logits = self.manager.prefill(self.model, tokens)
        self.cache.replace(self.tensors())
        self.cache.extend(tokens)
        return logits[:, -1]

    def load(self, store: kvstore.Store, tokens: list[int]) -> int:
        """Restore what is stored, and tell the manager how many tokens it holds now."""
        hit = store.load_session(self.cache, tokens)
        self.manager.reset()
        self.manager.pos = hit.n_tokens
        for mask in self.manager._masks.values():  # noqa: SLF001  it has no public way
            mask.unmask(hit.n_tokens)
        return hit.n_tokens


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.db"
        chat = Chat()
        chat.forward(TOKENS[:35])
        with kvstore.open(path) as store:
            store.save_session(chat.cache, TOKENS[:35], name="chat")
        expected = chat.forward(TOKENS[35:])

        chat = Chat()  # as another process would
        with kvstore.open(path) as store:
            n_restored = chat.load(store, TOKENS)
        found = chat.forward(TOKENS[n_restored:])
    if not torch.equal(found, expected):
        raise SystemExit("the logits differ")
    print(f"restored {n_restored} of {len(TOKENS)} tokens; the next logits are the same")


if __name__ == "__main__":
    main()
