"""A model of 124 million seeded parameters as a real ExecuTorch program; exported once, and kept.

    python benchmarks/program.py    # export it now, and print where it is

A Llama of 12 layers, dim 768, 12 heads over 4 KV heads of 64, 32,000 token ids and 4,608 positions,
in float32 through ExecuTorch's stock exporter, for XNNPACK: 24 KiB of K and V a token. What it says
is noise; what it costs is what a trained one costs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import CACHE, ROOT, version

N_PARAMETERS_TEXT = "124M"
MAX_CONTEXT_N_TOKENS = 4608
_MAX_SEQ_N_TOKENS = 2048
_PARAMS = {
    "dim": 768,
    "n_layers": 12,
    "n_heads": 12,
    "n_kv_heads": 4,
    "vocab_size": 32_000,
    "hidden_dim": 2048,
    "norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "use_scaled_rope": False,
    "multiple_of": 32,
}


def unavailable() -> str | None:
    """Why no program can be made or run here, or None."""
    if importlib.util.find_spec("executorch") is None:
        return "ExecuTorch is not installed (pip install 'kvstore[executorch]')"
    return None


def path() -> Path:
    """The program; exported now, in a process of its own, if it is not there (a minute or so)."""
    target = CACHE / f"llama-{N_PARAMETERS_TEXT}-executorch-{version('executorch')}.pte"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"exporting {target.name}, once; this takes a minute or so", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, __file__, "--export-to", str(target)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"the export failed:\n{done.stderr[-4000:]}")
    return target


def export(target: Path) -> None:
    """As the command line of the stock exporter does it."""
    import torch
    from executorch.examples.models.llama.export_llama_lib import export_llama
    from executorch.extension.llm.export.config.llm_config import LlmConfig
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        work = Path(name)
        (work / "params.json").write_text(json.dumps(_PARAMS))
        torch.save(_weights(), work / "model.pth")
        options = [
            f"base.checkpoint={work / 'model.pth'}",
            f"base.params={work / 'params.json'}",
            f"export.max_seq_length={_MAX_SEQ_N_TOKENS}",
            f"export.max_context_length={MAX_CONTEXT_N_TOKENS}",
            f"export.output_name={work / 'program.pte'}",
            f"export.output_dir={work}",
            "model.use_kv_cache=True",
            "model.use_sdpa_with_kv_cache=True",
            "model.dtype_override=fp32",
            "backend.xnnpack.enabled=True",
        ]
        merged = OmegaConf.merge(OmegaConf.structured(LlmConfig), OmegaConf.from_dotlist(options))
        os.chdir(work)  # it writes beside the program, too
        export_llama(OmegaConf.to_object(merged))
        (work / "program.pte").replace(target)
        os.chdir(target.parent)


def _weights() -> dict[str, object]:
    """Parameters by name, of the scale that training begins with."""
    import torch
    from executorch.examples.models.llama.llama_transformer import construct_transformer
    from executorch.examples.models.llama.model_args import ModelArgs

    model = construct_transformer(ModelArgs(**_PARAMS, max_seq_len=128, max_context_len=128))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return dict(model.named_parameters())


def main() -> None:
    """Export to a path, or print where the program is."""
    if sys.argv[1:2] == ["--export-to"]:
        sys.path.insert(0, str(ROOT))
        export(Path(sys.argv[2]))
    else:
        print(path())


if __name__ == "__main__":
    main()
