"""A persistent store for the KV caches of models that run on PyTorch ExecuTorch.

store = kvstore.open("sessions.db")
hit = store.load_session(cache, tokens)
store.save_session(cache, tokens, name="chat-42")
"""

from kvstore.background import PendingSave
from kvstore.codec import (
    MIN_TRAINING_N_TOKENS,
    CodecChoice,
    Expansion,
    Grid,
    Kernels,
    Rotation,
    use_kernels,
)
from kvstore.db.sessions import SessionInfo
from kvstore.db.stats import StoreStats
from kvstore.errors import KVStoreError
from kvstore.kinds import Held, Kind
from kvstore.layout import Fingerprint, Layout, LiveCache, TensorSpec
from kvstore.lineage import Edit, Lineage, lineage_of
from kvstore.load import LoadResult, MissReason
from kvstore.prune import PruneResult
from kvstore.save import SaveResult
from kvstore.store import Store
from kvstore.store import open_store as open  # noqa: A004  # as in gzip.open, dbm.open
from kvstore.token_log import TokenLog
from kvstore.tokens import token_ids
from kvstore.verify import VerifyReport

__version__ = "0.1.0"

__all__ = [
    "MIN_TRAINING_N_TOKENS",
    "CodecChoice",
    "Edit",
    "Expansion",
    "Fingerprint",
    "Grid",
    "Held",
    "KVStoreError",
    "Kernels",
    "Kind",
    "Layout",
    "Lineage",
    "LiveCache",
    "LoadResult",
    "MissReason",
    "PendingSave",
    "PruneResult",
    "Rotation",
    "SaveResult",
    "SessionInfo",
    "Store",
    "StoreStats",
    "TensorSpec",
    "TokenLog",
    "VerifyReport",
    "lineage_of",
    "open",
    "token_ids",
    "use_kernels",
]
