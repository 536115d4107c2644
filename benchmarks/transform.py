"""Would a transform codec (decorrelate, one step for all, entropy code) beat int4? The curve.

    python benchmarks/transform.py [--gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--n-texts 3]

1,536 tokens are coded and decoded in the cache, then 384 more are forced through the model, which
is compared with itself behind the exact cache. Bits are per number of the cache (float32 has 32),
all side information counted but a basis that belongs to the model; the first 4 tokens stay exact.
``packed`` is without an entropy coder, ``stored`` with one (zstd for int*, DEFLATE's Huffman for
the rest), ``ideal`` the entropy of what that coder gets. ``unrope``: K is turned back before RoPE.
The texts are held out of the demo model's training; bases come from other texts, of Python's
standard library (which it was trained on). Decoding: numpy's CPU time per MB of float32.
"""

from __future__ import annotations

import argparse
import functools
import os
import sysconfig
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread, also for numpy's matrix products
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
import numpy as np
from transform_codecs import Coded, Transform, int_codec
from transform_models import Gguf, Program

ROOT = Path(__file__).parents[1]
N_STORED, N_FORCED = 1536, 384
VARIANTS = {
    "scalar": ("none", False, 0, (0.3, 0.6)),
    "scalar unrope": ("none", True, 0, (0.15, 0.3, 0.6)),
    "hadamard unrope": ("hadamard", True, 0, (0.3, 0.6)),
    "dct tokens": ("dct", False, 0, (0.3, 0.6)),
    "dct tokens unrope": ("dct", True, 0, (0.3, 0.6)),
    "pca chunk unrope": ("chunk", True, 0, (0.3, 0.6)),
    "pca session unrope": ("session", True, 0, (0.3, 0.6)),
    "pca model": ("model", False, 0, (0.3, 0.6)),
    "pca model unrope": ("model", True, 0, (0.15, 0.3, 0.6, 1.0)),
    "... K and V jointly": ("model", True, 1, (0.075, 0.15, 0.3, 0.6, 1.0)),
    "... of 5 or 6 layers": ("model", True, 6, (0.15, 0.3, 0.6, 1.0)),
}
"""Basis, unrope, layers jointly, and steps in units of a tensor's spread about its means."""


def texts() -> dict[str, str]:
    """What is measured on: code and prose, none of it seen by the demo's model in training."""
    library = Path(sysconfig.get_path("stdlib"))
    records = sorted((ROOT / "docs" / "adr").glob("00*.md"))[:9]
    return {
        "gzip.py": (library / "gzip.py").read_text(),
        "records": "\n".join(path.read_text() for path in records),
        "Apache licence": (ROOT / "LICENSE").read_text(),
        "test_textwrap.py": (library / "test" / "test_textwrap.py").read_text(),
        "Python licence": (library / "LICENSE.txt").read_text()[2000:],
    }


def calibration() -> list[str]:
    """What a model's bases are made from: prose (Python's help) and code."""
    library = Path(sysconfig.get_path("stdlib"))
    topics = (library / "pydoc_data" / "topics.py").read_text().replace("\\n", "")
    topics = topics.replace("'\n               '", "\n")
    names = ("argparse", "doctest", "ipaddress", "pathlib", "statistics", "subprocess", "tarfile")
    code = [(library / f"{name}.py").read_text()[3000:15000] for name in (*names, "zipfile")]
    return [topics[20000 + 50000 * i :][:9000] for i in range(8)] + code


def main() -> None:
    """Print the curve, and what each codec needs for int4's divergence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="another model; needs transformers and gguf")
    parser.add_argument("--n-texts", type=int, default=3)
    parser.add_argument("--n-known", type=int, default=16, help="texts that bases are made from")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    arguments = parser.parse_args()

    model = Program() if arguments.gguf is None else Gguf(arguments.gguf)
    print(model.name)
    sources = calibration()[:: max(1, 16 // arguments.n_known)][: arguments.n_known]
    known = [model.prefill(model.ids(text)[:N_STORED]) for text in sources]
    cases = []
    for name, text in list(texts().items())[: arguments.n_texts]:
        ids = model.ids(text)[: N_STORED + N_FORCED]
        cache = model.prefill(ids[:N_STORED])
        exact = model.forced(ids[:N_STORED], cache, ids[N_STORED:-1])
        cases.append((ids, cache, exact))
        truth = exact[np.arange(len(exact)), ids[N_STORED + 1 :]]
        print(f"{name}: perplexity {np.exp(-truth.mean()):.2f}")
    print(
        "codec                  step  packed stored  ideal   mean KL  worst KL   ppl %  top-1 %"
        "  K mse  V mse  us/MB  basis KiB"
    )
    curves: dict[str, list[tuple[float, float]]] = {}
    for n_bits in (8, 5, 4, 3, 2):
        codec = functools.partial(int_codec, n_bits=n_bits)
        curves[f"int{n_bits}"] = [line(model, f"int{n_bits}", "-", codec, cases)]
    for name, (basis, unrope, n_layers, steps) in VARIANTS.items():
        if arguments.only in name:
            fitted = Transform(basis, model, known, unrope=unrope, n_layers=n_layers)
            curves[name] = [
                line(
                    model,
                    name,
                    f"{step}",
                    functools.partial(fitted, step=step),
                    cases,
                    basis_nbytes=fitted.basis_nbytes,
                )
                for step in steps
            ]
    for n_bits in (4, 3):
        bits, divergence = curves[f"int{n_bits}"][0]
        print(f"stored bits for int{n_bits}'s mean KL ({divergence:.5f}; it takes {bits:.2f}):")
        for name, points in curves.items():
            sizes, divergences = np.array(sorted(points, key=lambda point: point[1])).T
            if divergences[0] <= divergence <= divergences[-1] and len(points) > 1:
                need = np.interp(np.log(divergence), np.log(divergences), sizes)
                print(f"  {name:22} {need:5.2f}  ({bits / need:.2f} times smaller)")


def line(
    model: Program | Gguf,
    name: str,
    step: str,
    codec: Callable[[np.ndarray], Coded],
    cases: list[tuple[list[int], np.ndarray, np.ndarray]],
    *,
    basis_nbytes: int = 0,
) -> tuple[float, float]:
    """Print one point of the curve, a mean over the texts; stored bits and mean KL."""
    rows = []
    for ids, cache, exact in cases:
        coded = codec(cache)
        found = model.forced(ids[:N_STORED], coded.cache, ids[N_STORED:-1])
        divergence = (np.exp(exact) * (exact - found)).sum(-1)
        each = np.arange(len(exact)), ids[N_STORED + 1 :]
        error = ((coded.cache - cache) ** 2).mean((1, 2, 3))
        rows.append(
            (
                *(8 * n / cache.size for n in (coded.packed, coded.stored, coded.ideal)),
                divergence.mean(),
                divergence.max(),
                100 * np.expm1(exact[each].mean() - found[each].mean()),
                100 * (exact.argmax(-1) == found.argmax(-1)).mean(),
                error[::2].mean(),
                error[1::2].mean(),
                1e6 * coded.decode_s / (cache.nbytes / 1e6),
            )
        )
    packed, stored, ideal, kl, *others, speed = np.mean(rows, 0)
    worst, perplexity, top_1, k_error, v_error = others
    print(
        f"{name:21} {step:>5} {packed:7.2f} {stored:6.2f} {ideal:6.2f} {kl:9.5f} {worst:9.4f} "
        f"{perplexity:+7.2f} {top_1:8.1f} {k_error:6.4f} {v_error:6.4f} {speed:6.0f} "
        f"{basis_nbytes / 1024:10.0f}",
        flush=True,
    )
    return stored, kl


if __name__ == "__main__":
    main()
