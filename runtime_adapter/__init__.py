"""ExecuTorch programs with a live, named, storable KV cache.

``Model.open`` opens a ``.pte`` and gives its planned cache to a ``kvstore``. ``TensorCache`` does
the same for tensors that the caller holds (``runtime_adapter.huggingface`` for those of
transformers). torch and executorch are imported when they are needed, not before.
"""

from runtime_adapter.caches.identity import ModelFingerprint, fingerprint_of
from runtime_adapter.caches.planned import PlannedCache
from runtime_adapter.caches.tensors import TensorCache, tensor_spec
from runtime_adapter.model import Model
from runtime_adapter.session import (
    ByteTokenizer,
    LayerRope,
    Pairing,
    RopeSpec,
    Sampler,
    Session,
    SessionResult,
    TextSession,
)

__all__ = [
    "ByteTokenizer",
    "LayerRope",
    "Model",
    "ModelFingerprint",
    "Pairing",
    "PlannedCache",
    "RopeSpec",
    "Sampler",
    "Session",
    "SessionResult",
    "TensorCache",
    "TextSession",
    "fingerprint_of",
    "tensor_spec",
]
