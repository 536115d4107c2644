"""Conversations: token ids as the truth, and a live cache that follows them."""

from runtime_adapter.session.follower import SessionResult
from runtime_adapter.session.rope import LayerRope, Pairing, RopeSpec
from runtime_adapter.session.sampler import Sampler
from runtime_adapter.session.session import Session
from runtime_adapter.session.text import ByteTokenizer, TextSession

__all__ = [
    "ByteTokenizer",
    "LayerRope",
    "Pairing",
    "RopeSpec",
    "Sampler",
    "Session",
    "SessionResult",
    "TextSession",
]
