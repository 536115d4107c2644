"""Store a ``StaticCache`` of Hugging Face's transformers; its tensors are shared with the store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import kvstore
from runtime_adapter import fingerprint_of
from runtime_adapter.huggingface import StaticHuggingFaceCache

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


def make_model() -> tuple[Any, Any, StaticHuggingFaceCache]:
    torch.manual_seed(0)  # yours: AutoModelForCausalLM.from_pretrained(...)
    model = transformers.LlamaForCausalLM(CONFIG).eval()
    past = transformers.StaticCache(config=CONFIG, max_cache_len=64)
    past.early_initialization(
        batch_size=1,
        num_heads=CONFIG.num_key_value_heads,
        head_dim=CONFIG.head_dim,
        dtype=model.dtype,
        device=model.device,
    )
    program = f"transformers {transformers.__version__} {CONFIG.to_json_string()}"
    fingerprint = fingerprint_of(model.state_dict(), program=program)
    return model, past, StaticHuggingFaceCache(past, fingerprint=fingerprint)


def forward(model: Any, past: Any, cache: StaticHuggingFaceCache, tokens: list[int]) -> Any:
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
