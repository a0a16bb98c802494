"""The policies of one cache: which blocks go first, which are let in, and who learns from their uses."""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU, OpenUse, Use, UseTracker
from dynamo.kvcache.hashing import BlockKey

__all__ = ["AdmissionName", "BeginUse", "EvictionName", "Policies", "make_policies"]

EvictionName = Literal["lru"]
AdmissionName = Literal["always"]

BeginUse = Callable[[list[BlockKey]], OpenUse]
"""Begins the use of a chain, given its keys so far."""


class AdmissionPolicy(Protocol):
    def admit(self, tier: str, keys: Sequence[Hashable], use: Use, num_lacking: int) -> int: ...


@dataclass(frozen=True, slots=True)
class Policies:
    """What pools and sequences of one cache share.

    Attributes:
        new_order: makes an order of eviction, one for each pool.
        tracker: numbers the uses; None: all uses are anonymous.
        admission: says what the tiers below the device take; None: everything.
    """

    new_order: Callable[[], EvictionOrder] = LeafFirstLRU
    tracker: UseTracker | None = None
    admission: AdmissionPolicy | None = None

    def begin_use(self, num_prompt_tokens: int, priority: int, ttl_s: float | None) -> BeginUse | None:
        """What begins the use of a sequence; None where nobody keeps track of uses."""
        tracker = self.tracker
        if tracker is None:
            return None
        expires_s = None if ttl_s is None else time.monotonic() + ttl_s
        return lambda keys: OpenUse(tracker, keys, num_prompt_tokens, priority=priority, expires_s=expires_s)


def make_policies(eviction: EvictionName, admission: AdmissionName) -> Policies:
    """The policies of these names.

    Raises:
        CacheConfigError: there is no such policy.
    """
    for what, name, names in (
        ("eviction", eviction, get_args(EvictionName)),
        ("admission", admission, get_args(AdmissionName)),
    ):
        if name not in names:
            raise CacheConfigError(f"{name!r} is no policy of {what}; there are {', '.join(names)}")
    return Policies()
