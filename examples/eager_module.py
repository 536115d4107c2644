"""Store the cache of an eager PyTorch module: ExecuTorch's Llama before it is exported.

The module keeps keys and values in buffers and writes into them in place; the store does too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from executorch.examples.models.llama.llama_transformer import construct_transformer
from executorch.examples.models.llama.model_args import ModelArgs

import kvstore
from runtime_adapter import TensorCache, fingerprint_of

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "hidden_dim": 64,
    "max_seq_len": 64,
    "max_context_len": 64,
    "use_kv_cache": True,
    "enable_dynamic_shape": True,
}
TOKENS = [(7 * position) % 96 for position in range(40)]


def make_model() -> tuple[Any, TensorCache]:
    torch.manual_seed(0)
    model = construct_transformer(ModelArgs(**PARAMS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    cache = TensorCache.from_tensors(
        {
            name: buffer
            for name, buffer in model.named_buffers()
            if name.endswith((".k_cache", ".v_cache"))  # [1, n_kv_heads, n_slots, head_dim]
        },
        token_axis=2,
        # Parameters only: the cache itself is among the buffers.
        fingerprint=fingerprint_of(dict(model.named_parameters()), program=json.dumps(PARAMS)),
    )
    return model, cache


def forward(model: Any, cache: TensorCache, tokens: list[int]) -> torch.Tensor:
    position = torch.tensor([cache.n_tokens])
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), {"input_pos": position})
    cache.extend(tokens)
    return logits


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.db"
        model, cache = make_model()
        forward(model, cache, TOKENS[:30])
        with kvstore.open(path) as store:
            store.save_session(cache, TOKENS[:30], name="chat")
        expected = forward(model, cache, TOKENS[30:])

        model, cache = make_model()  # as another process would
        with kvstore.open(path) as store:
            hit = store.load_session(cache, TOKENS)
        found = forward(model, cache, TOKENS[hit.n_tokens :])
    if not torch.equal(found, expected):
        raise SystemExit("the logits differ")
    print(f"restored {hit.n_tokens} of {len(TOKENS)} tokens; the next logits are the same")


if __name__ == "__main__":
    main()
