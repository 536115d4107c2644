"""Store a ``DynamicCache`` of Hugging Face's transformers.

It makes new tensors at every step, so the adapter keeps a copy with room to grow, and gives
the cache new tensors after a load.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import kvstore
from runtime_adapter import fingerprint_of
from runtime_adapter.huggingface import DynamicHuggingFaceCache

CONFIG = transformers.LlamaConfig(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
)
TOKENS = [(7 * position) % 96 for position in range(40)]


def make_model() -> tuple[Any, Any, DynamicHuggingFaceCache]:
    torch.manual_seed(0)  # yours: AutoModelForCausalLM.from_pretrained(...)
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    past = transformers.DynamicCache()
    program = f"transformers {transformers.__version__} {CONFIG.to_json_string()}"
    fingerprint = fingerprint_of(model.state_dict(), program=program)
    cache = DynamicHuggingFaceCache(
        past,
        n_layers=CONFIG.num_hidden_layers,
        n_kv_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        dtype=model.dtype,
        capacity_n_tokens=CONFIG.max_position_embeddings,
        fingerprint=fingerprint,
    )
    return model, past, cache


def forward(model: Any, past: Any, cache: DynamicHuggingFaceCache, tokens: list[int]) -> Any:
    with torch.no_grad():
        output = model(torch.tensor([tokens]), past_key_values=past)
    cache.extend(tokens)
    return output.logits[0, -1]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sessions.db"
        model, past, cache = make_model()
        forward(model, past, cache, TOKENS[:30])
        with kvstore.open(path) as store:
            store.save_session(cache, TOKENS[:30], name="chat")
        expected = forward(model, past, cache, TOKENS[30:])

        model, past, cache = make_model()  # as another process would
        with kvstore.open(path) as store:
            hit = store.load_session(cache, TOKENS)
        found = forward(model, past, cache, TOKENS[hit.n_tokens :])
    if not torch.equal(found, expected):
        raise SystemExit("the logits differ")
    print(f"restored {hit.n_tokens} of {len(TOKENS)} tokens; the next logits are the same")


if __name__ == "__main__":
    main()
