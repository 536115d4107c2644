"""Real exported programs for the tests: made once, kept by a hash of how they were made.

    path = programs.path("stock_fp32")            # a .pte, exported now if it is new
    python -m tests.programs stock_fp32 plain     # make them beforehand; no names: all
    python -m tests.programs --fast               # those of the fast tests

They lie in ``.cache/programs`` (or ``KVSTORE_TEST_PROGRAMS``). Models are small and
seeded: 2 layers, dim 64, 4 heads over 2 KV heads of 16, 96 token ids, 512 positions.
``SPECS`` lists them. Exports run in child processes, one a core, each with many of those
that were asked for together, because importing the exporter takes some ten seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECIPE_VERSION = 1
"""Part of every program's hash: raise it when the way of building changes."""

_PARAMS: dict[str, Any] = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 96,
    "hidden_dim": 128,
    "norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "use_scaled_rope": False,
    "multiple_of": 32,
}
_MAX_SEQ = 128
_MAX_CONTEXT = 512


@dataclass(frozen=True, kw_only=True)
class Spec:
    """How one program is made.

    ``maker`` is ``stock`` (the stock LLM exporter with ``options`` in its own
    ``section.key=value`` form) or the name of a ``_make_*`` function of this module.
    """

    maker: str = "stock"
    options: tuple[str, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    max_seq: int = _MAX_SEQ
    has_data_file: bool = False
    since: tuple[int, int] = (1, 4)
    """First ExecuTorch (major, minor) that exports it: has the option, or is enough of a test."""


_CACHE = ("model.use_kv_cache=True",)
_SDPA = (*_CACHE, "model.use_sdpa_with_kv_cache=True")

_QWEN35: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rms_norm_add_unit_offset": True,
    "use_q_gate": True,
    "use_qk_norm": True,
    "qk_norm_before_rope": True,
}
_LFM2: dict[str, Any] = {"layer_types": ["conv", "full_attention", "conv"], "n_layers": 3}

SPECS: dict[str, Spec] = {
    # Custom cache [1, S, H_kv, D] and custom attention.
    "stock_fp32": Spec(options=_SDPA),
    "stock_fp16": Spec(options=(*_SDPA, "model.dtype_override=fp16")),
    "stock_bf16": Spec(options=(*_SDPA, "model.dtype_override=bf16")),
    "other_seed": Spec(options=_SDPA, seed=1),
    "one_token": Spec(options=(*_SDPA, "model.enable_dynamic_shape=False")),
    "full_logits": Spec(options=(*_SDPA, "debug.generate_full_logits=True")),
    "head_dim_12": Spec(options=_SDPA, params={"head_dim": 12, "n_heads": 4, "n_kv_heads": 1}),
    "xnnpack": Spec(options=(*_SDPA, "backend.xnnpack.enabled=True")),
    "quantized_cache": Spec(options=(*_SDPA, "model.quantize_kv_cache=True")),
    # Plain cache [1, H_kv, S, D] and attention written out.
    "plain": Spec(options=_CACHE),
    "plain_bf16": Spec(options=(*_CACHE, "model.dtype_override=bf16")),
    "plain_one_token": Spec(options=(*_CACHE, "model.enable_dynamic_shape=False")),
    "plain_xnnpack": Spec(options=(*_CACHE, "backend.xnnpack.enabled=True")),
    # Weights in a .ptd beside the program.
    "external_weights": Spec(maker="external_weights", has_data_file=True),
    "external_xnnpack": Spec(
        options=(*_SDPA, "backend.xnnpack.enabled=True", "export.foundation_weights_file=weights"),
        has_data_file=True,
    ),
    # Through the export configuration of runtime_adapter.export.
    "named": Spec(maker="configured"),
    "unnamed": Spec(maker="configured_without_names"),
    "two_methods": Spec(maker="two_methods"),
    "encoder_beside": Spec(maker="encoder_beside", params={"n_kv_heads": 4, "head_dim": 64}),
    # Rings: local layers keep a window of the last positions, and attention sinks.
    "ring": Spec(options=(*_SDPA, "model.local_global_attention=[0,64]"), max_seq=64),
    "ring_only": Spec(
        options=(*_SDPA, "model.local_global_attention=[16]"), max_seq=24, since=(1, 5)
    ),
    "ring_xnnpack": Spec(
        options=(*_SDPA, "model.local_global_attention=[0,16]", "backend.xnnpack.enabled=True"),
        max_seq=24,
        since=(1, 5),
    ),
    "ring_one_token": Spec(
        options=(
            *_SDPA,
            "model.local_global_attention=[0,16]",
            "model.enable_dynamic_shape=False",
        ),
        max_seq=24,
        since=(1, 5),
    ),
    "plain_ring": Spec(options=(*_CACHE, "model.local_global_attention=[0,16]"), max_seq=24),
    "quantized_ring": Spec(
        options=(
            *_SDPA,
            "model.quantize_kv_cache=True",
            "model.local_global_attention=[0,16]",
        ),
        max_seq=24,
    ),
    "sink": Spec(options=(*_SDPA, "model.use_attention_sink='4,64'"), max_seq=64, since=(1, 5)),
    "plain_sink": Spec(
        options=(*_CACHE, "model.use_attention_sink='4,16'"), max_seq=24, since=(1, 5)
    ),
    # Recurrent layers beside attention: their state is good at one length only.
    "qwen35": Spec(options=_SDPA, params=_QWEN35, since=(1, 5)),
    "qwen35_one_token": Spec(options=(*_SDPA, "model.enable_dynamic_shape=False"), params=_QWEN35),
    "lfm2": Spec(options=_SDPA, params=_LFM2),
    "lfm2_xnnpack": Spec(
        options=(*_SDPA, "backend.xnnpack.enabled=True"), params=_LFM2, since=(1, 5)
    ),
    # int8 with a scale that is a constant of the program. Not called "int8": the exporter takes
    # a checkpoint for one of quantized weights if its path has that in it.
    "static_quantized": Spec(
        options=(
            *_CACHE,
            "model.static_quantize_kv_cache=True",
            "model.enable_dynamic_shape=False",
        ),
        since=(1, 5),
    ),
    # The last layer reads the keys and values of the layer before it.
    "yoco_one_token": Spec(
        options=(*_SDPA, "model.enable_dynamic_shape=False"),
        params={"n_layers": 3, "num_kv_shared_layers": 1},
    ),
    # Models of tests.models: shapes that differ from layer to layer, packed caches, and a
    # tensor that never changes after the first step.
    "gemma4_one_token": Spec(maker="gemma4", max_seq=1, since=(1, 5)),
    "two_shapes": Spec(maker="two_shapes", since=(1, 5)),
    "turboquant": Spec(maker="turboquant", since=(1, 5)),
    "first_step": Spec(maker="first_step", since=(1, 5)),
    # Two ring layers whose bookkeeping a delegate moves before both of them.
    "plain_rings_xnnpack": Spec(
        options=(
            *_CACHE,
            "model.local_global_attention=[16,0,16]",
            "backend.xnnpack.enabled=True",
        ),
        params={"n_layers": 3},
        max_seq=24,
        since=(1, 5),
    ),
    # Two methods of one file that compute with different weights.
    "lora": Spec(maker="lora", since=(1, 5)),
    # From Hugging Face's model and its own exporter.
    "huggingface": Spec(maker="huggingface", since=(1, 5)),
    # A delegate took the cache over, or that of one layer of two; nothing here runs them.
    "vulkan": Spec(options=(*_SDPA, "backend.vulkan.enabled=True"), since=(1, 5)),
    "vulkan_hybrid": Spec(
        options=(*_SDPA, "backend.vulkan.enabled=True"), params=_QWEN35, since=(1, 5)
    ),
    "coreml": Spec(maker="coreml", since=(1, 5)),
    "native": Spec(maker="native", since=(1, 5)),
    # As the stock exporter does it: planned, but read and given back whole by the delegate.
    "coreml_planned": Spec(
        options=(
            *_CACHE,
            "model.enable_dynamic_shape=False",
            "backend.coreml.enabled=True",
            "backend.coreml.ios=18",
        ),
        since=(1, 5),
    ),
    # No state at all.
    "no_cache": Spec(maker="no_cache"),
}

_NEEDED_PACKAGES = {"coreml": ("coremltools",), "coreml_planned": ("coremltools",)}
"""What ExecuTorch brings along on some platforms only."""

FAST = ("stock_fp32", "quantized_ring", "plain", "lfm2", "named", "external_weights")
"""What the fast tests use: ``make test`` makes these first, all at once."""


def version() -> tuple[int, ...]:
    """The installed ExecuTorch's version, without importing it."""
    text = importlib.metadata.version("executorch").split("+")[0]
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def params(name: str) -> dict[str, Any]:
    """The model's parameters behind program ``name``, with ``max_seq`` and ``max_context``."""
    spec = SPECS[name]
    return {**_PARAMS, **spec.params, "max_seq": spec.max_seq, "max_context": _MAX_CONTEXT}


def is_available(name: str) -> bool:
    """Whether the installed ExecuTorch has the options of program ``name``."""
    has_packages = all(map(importlib.util.find_spec, _NEEDED_PACKAGES.get(name, ())))
    return version()[:2] >= SPECS[name].since and has_packages


def path(name: str) -> Path:
    """The ``.pte`` of program ``name``; exported now if there is none yet."""
    return prebuild([name])[0]


def data_path(name: str) -> Path | None:
    """The ``.ptd`` of program ``name``, or None if its weights are in the ``.pte``."""
    if not SPECS[name].has_data_file:
        return None
    return path(name).with_suffix(".ptd")


def prebuild(names: Sequence[str]) -> list[Path]:
    """The programs ``names``; missing ones are exported now, on all cores."""
    targets = [_target(name) for name in names]
    missing = [name for name, target in zip(names, targets, strict=True) if not target.is_file()]
    n_processes = min(os.cpu_count() or 1, (len(missing) + 1) // 2)
    with contextlib.ExitStack() as stack:
        exporting = [stack.enter_context(_child(missing)) for _ in range(n_processes)]
        for child in exporting:
            child.wait()
    return targets


def _folder() -> Path:
    folder = Path(os.environ.get("KVSTORE_TEST_PROGRAMS") or ROOT / ".cache" / "programs")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _target(name: str) -> Path:
    recipe = {
        "recipe": RECIPE_VERSION,
        "executorch": importlib.metadata.version("executorch"),
        "base": [_PARAMS, _MAX_CONTEXT],
        "spec": asdict(SPECS[name]),
    }
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return _folder() / f"{name}-{digest[:16]}.pte"


@contextlib.contextmanager
def _child(names: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that exports ``names``; at the end it is waited for, and its failure raised."""
    with tempfile.TemporaryFile() as log:
        with subprocess.Popen(
            [sys.executable, "-m", "tests.programs", "--in-this-process", *names],
            cwd=ROOT,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "KVSTORE_TEST_PROGRAMS": str(_folder())},
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as child:
            yield child
        if child.returncode:
            log.seek(0)
            tail = log.read().decode("utf-8", "replace")[-3000:]
            raise RuntimeError(f"exporting {', '.join(names)} failed:\n{tail}")


# ------------------------------------------------------------- in the child process


def _build_all(names: Sequence[str]) -> None:
    """Export what is missing: first what no other process is at, then wait for the rest."""
    taken = [name for name in names if not _build_alone(name, wait=False)]
    for name in taken:
        _build_alone(name, wait=True)


def _build_alone(name: str, *, wait: bool) -> bool:
    """Export ``name`` unless it is there; False if another process is at it."""
    target = _target(name)
    # The kernel lets go of the lock if the process dies.
    with target.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not target.is_file():
            started = time.monotonic()
            # An export makes millions of objects that live as long as it does.
            gc.disable()
            _build(name)
            gc.enable()
            gc.collect()
            print(f"[programs] {name}: {time.monotonic() - started:.1f} s", flush=True)
    return True


def _build(name: str) -> None:
    """Export ``name`` beside its place, then move it there; the ``.pte`` last."""
    target = _target(name)
    spec = SPECS[name]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
        made = _MAKERS[spec.maker](spec, Path(work))
        if spec.has_data_file:
            data = next(file for file in Path(work).iterdir() if file.suffix == ".ptd")
            data.replace(target.with_suffix(".ptd"))
        made.replace(target)


def _make_stock(spec: Spec, work: Path, change: Callable[[Any], None] | None = None) -> Path:
    """As the command line of the stock exporter does it; ``change`` edits its configuration."""
    from executorch.examples.models.llama.export_llama_lib import export_llama
    from executorch.extension.llm.export.config.llm_config import LlmConfig
    from omegaconf import OmegaConf

    params_file, checkpoint = work / "params.json", work / "model.pth"
    params_file.write_text(json.dumps({**_PARAMS, **spec.params}))
    _save_checkpoint(spec, checkpoint)
    options = OmegaConf.from_dotlist(
        [
            f"base.checkpoint={checkpoint}",
            f"base.params={params_file}",
            f"export.max_seq_length={spec.max_seq}",
            f"export.max_context_length={_MAX_CONTEXT}",
            f"export.output_name={work / 'program.pte'}",
            f"export.output_dir={work}",
            *spec.options,
        ]
    )
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LlmConfig), options))
    if change is not None:
        change(config)
    before = Path.cwd()
    os.chdir(work)  # the .ptd is written into the working directory
    try:
        export_llama(config)
    finally:
        os.chdir(before)
    return work / "program.pte"


def _make_lora(spec: Spec, work: Path) -> Path:
    """``forward``, and ``lora_forward`` with an adapter on K and V, over one cache."""
    import torch
    from executorch.extension.llm.export.config.llm_config import LoraConfig, MethodConfig
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(5)
    adapter = {}
    for layer in range(_PARAMS["n_layers"]):
        for name in ("k_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (4, 64)), ("lora_B", (32, 4))):
                adapter[f"{prefix}.{part}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    save_file(adapter, work / "adapter.safetensors")
    lora = LoraConfig(
        adapter_checkpoint=str(work / "adapter.safetensors"),
        lora_rank=4,
        lora_alpha=8,
        target_modules=["k_proj", "v_proj"],
    )

    def with_methods(config: Any) -> None:
        config.multimethod.methods = [
            MethodConfig("forward"),
            MethodConfig("lora_forward", lora_config=lora),
        ]
        config.multimethod.share_mutable_buffers = True

    return _make_stock(replace(spec, options=_SDPA), work, with_methods)


def _make_huggingface(spec: Spec, work: Path) -> Path:
    """A Llama of transformers with its static cache, one token at a time."""
    import torch
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.executorch import TorchExportableModuleForDecoderOnlyLM

    torch.manual_seed(spec.seed)
    config = LlamaConfig(
        vocab_size=_PARAMS["vocab_size"],
        hidden_size=_PARAMS["dim"],
        intermediate_size=_PARAMS["hidden_dim"],
        num_hidden_layers=_PARAMS["n_layers"],
        num_attention_heads=_PARAMS["n_heads"],
        num_key_value_heads=_PARAMS["n_kv_heads"],
        max_position_embeddings=spec.max_seq,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config = GenerationConfig(
        use_cache=True,
        cache_implementation="static",
        max_length=spec.max_seq,
        cache_config={"batch_size": 1, "max_cache_len": spec.max_seq},
    )
    exportable = TorchExportableModuleForDecoderOnlyLM(
        model, batch_size=1, max_cache_len=spec.max_seq
    )
    with torch.no_grad():
        method = exportable.export(
            input_ids=torch.zeros((1, 1), dtype=torch.long), cache_position=torch.arange(1)
        )
        edge = to_edge(
            method, compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
        )
    target = work / "program.pte"
    with target.open("wb") as stream:
        edge.to_executorch(ExecutorchBackendConfig()).write_to_file(stream)
    return target


def _model(spec: Spec, *, use_kv_cache: bool = True) -> Any:
    import torch
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    args = ModelArgs(
        **{**_PARAMS, **spec.params},
        max_seq_len=spec.max_seq,
        max_context_len=_MAX_CONTEXT,
        use_kv_cache=use_kv_cache,
        enable_dynamic_shape=use_kv_cache,
    )
    model = construct_transformer(args).eval()
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.0 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if parameter.dim() == 1 else scale * noise)
    return model


def _save_checkpoint(spec: Spec, target: Path) -> None:
    import torch

    torch.save(dict(_model(spec, use_kv_cache=False).named_parameters()), target)


def _exported(model: Any, *, n_tokens: int, max_n_tokens: int | None) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    tokens = torch.zeros((1, n_tokens), dtype=torch.long)
    start = {"input_pos": torch.zeros(1, dtype=torch.long)}
    shapes = None
    if max_n_tokens is not None:
        shapes = ({1: torch.export.Dim("n", max=max_n_tokens)}, {"input_pos": {0: 1}})
    # The written-out attention; without gradients, dropout stays out of the graph.
    with sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        return torch.export.export(model, (tokens, start), dynamic_shapes=shapes, strict=True)


def _lower(methods: Any, config: Any, constants: dict[str, Any], target: Path) -> Path:
    from executorch.exir import EdgeCompileConfig, to_edge

    edge = to_edge(
        methods,
        constant_methods=constants,
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    program = edge.to_executorch(config)
    with target.open("wb") as stream:
        program.write_to_file(stream)
    if config.external_constants:
        program.write_tensor_data_to_file(str(target.parent))
    return target


def _constants(spec: Spec) -> dict[str, Any]:
    return {
        "get_max_seq_len": spec.max_seq,
        "get_max_context_len": _MAX_CONTEXT,
        "get_n_layers": _PARAMS["n_layers"],
        "get_vocab_size": _PARAMS["vocab_size"],
        "use_kv_cache": True,
    }


def _make_configured(spec: Spec, work: Path, **overrides: Any) -> Path:
    """A plain cache through ``kv_cache_config``."""
    from runtime_adapter.export import kv_cache_config

    method = _exported(_model(spec), n_tokens=2, max_n_tokens=spec.max_seq - 1)
    config = kv_cache_config(**overrides)
    return _lower(method, config, _constants(spec), work / "program.pte")


def _make_configured_without_names(spec: Spec, work: Path) -> Path:
    return _make_configured(spec, work, emit_mutable_buffer_names=False)


def _make_external_weights(spec: Spec, work: Path) -> Path:
    """Every weight in ``weights.ptd``; no names in the program."""
    return _make_configured(
        spec, work, emit_mutable_buffer_names=False, external_constants=lambda _: "weights"
    )


def _make_two_methods(spec: Spec, work: Path) -> Path:
    """``forward`` for prompts and ``decode`` for one token, over one cache; no names."""
    from runtime_adapter.export import kv_cache_config

    model = _model(spec)
    methods = {
        "forward": _exported(model, n_tokens=2, max_n_tokens=spec.max_seq - 1),
        "decode": _exported(model, n_tokens=1, max_n_tokens=None),
    }
    config = kv_cache_config(emit_mutable_buffer_names=False)
    return _lower(methods, config, _constants(spec), work / "program.pte")


def _make_encoder_beside(spec: Spec, work: Path) -> Path:
    """A method without state, which has the cache's memory planned all the same."""
    import torch

    from runtime_adapter.export import kv_cache_config

    methods = {
        "encode": torch.export.export(torch.nn.Linear(4, 4).eval(), (torch.ones(2, 4),)),
        "forward": _exported(_model(spec), n_tokens=2, max_n_tokens=spec.max_seq - 1),
    }
    return _lower(methods, kv_cache_config(), _constants(spec), work / "program.pte")


def _make_model(name: str, spec: Spec, work: Path) -> Path:
    """A model of ``tests.models``, with the exporter's calls written out."""
    import torch
    from executorch.exir import ExecutorchBackendConfig

    from tests import models

    make = getattr(models, name)
    torch.manual_seed(spec.seed)
    model = models.seeded(
        make(vocab_size=_PARAMS["vocab_size"], dim=_PARAMS["dim"], max_context=_MAX_CONTEXT),
        spec.seed,
    )
    is_dynamic = spec.max_seq > 1
    method = _exported(
        model,
        n_tokens=2 if is_dynamic else 1,
        max_n_tokens=spec.max_seq - 1 if is_dynamic else None,
    )
    constants = {**_constants(spec), "get_n_layers": 2}
    return _lower(method, ExecutorchBackendConfig(), constants, work / "program.pte")


def _make_coreml(spec: Spec, work: Path) -> Path:
    """Core ML takes mutable buffers over unless it is told not to."""
    import coremltools
    from executorch.backends.apple.coreml.compiler import CoreMLBackend
    from executorch.backends.apple.coreml.partition import CoreMLPartitioner

    specs = CoreMLBackend.generate_compile_specs(minimum_deployment_target=coremltools.target.iOS18)
    partitioner = CoreMLPartitioner(compile_specs=specs, take_over_mutable_buffer=True)
    return _delegate(partitioner, spec, work / "program.pte")


def _make_native(spec: Spec, work: Path) -> Path:
    from executorch.backends.native.partitioner import NativePartitioner

    return _delegate(NativePartitioner(None), spec, work / "program.pte")


def _delegate(partitioner: Any, spec: Spec, target: Path) -> Path:
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(
        _exported(_model(spec), n_tokens=1, max_n_tokens=None),
        partitioner=[partitioner],
        constant_methods=_constants(spec),
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    with target.open("wb") as stream:
        edge.to_executorch().write_to_file(stream)
    return target


def _make_no_cache(spec: Spec, work: Path) -> Path:
    """The same model, computing everything anew at every call."""
    import torch
    from executorch.exir import ExecutorchBackendConfig

    model = _model(spec, use_kv_cache=False)
    with torch.no_grad():
        method = torch.export.export(model, (torch.zeros((1, 8), dtype=torch.long),), strict=True)
    return _lower(method, ExecutorchBackendConfig(), {}, work / "program.pte")


_MAKERS = {
    "stock": _make_stock,
    "configured": _make_configured,
    "configured_without_names": _make_configured_without_names,
    "external_weights": _make_external_weights,
    "two_methods": _make_two_methods,
    "encoder_beside": _make_encoder_beside,
    "gemma4": functools.partial(_make_model, "Gemma4"),
    "two_shapes": functools.partial(_make_model, "TwoShapes"),
    "turboquant": functools.partial(_make_model, "TurboQuant"),
    "first_step": functools.partial(_make_model, "FirstStep"),
    "lora": _make_lora,
    "huggingface": _make_huggingface,
    "coreml": _make_coreml,
    "native": _make_native,
    "no_cache": _make_no_cache,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description="make programs")
    parser.add_argument(
        "names", nargs="*", help=f"any of: {', '.join(SPECS)}; all if there is none"
    )
    parser.add_argument("--fast", action="store_true", help="those of the fast tests")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in SPECS]
    if unknown:
        parser.error(f"expected names among {', '.join(SPECS)}, found {', '.join(unknown)}")
    names = arguments.names or (FAST if arguments.fast else [*SPECS])
    if arguments.in_this_process:
        _build_all(names)
        return
    names = [name for name in names if is_available(name)]
    missing = [name for name in names if not _target(name).is_file()]
    if missing:
        print(f"exporting {len(missing)} programs for the tests, kept in {_folder()}", flush=True)
        started = time.monotonic()
        prebuild(missing)
        print(f"exported in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
