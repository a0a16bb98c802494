"""The policies of one cache: which blocks go first, which are let in, and who learns from their uses."""

import time
from collections.abc import Callable
from typing import Literal, get_args

from dynamo.kvcache.admission import Adaptive, AdmissionPolicy, SecondSighting
from dynamo.kvcache.errors import CacheConfigError
from dynamo.kvcache.eviction import EvictionOrder, LeafFirstLRU, OpenUse, UseCounter, UseTracker
from dynamo.kvcache.hashing import BlockKey
from dynamo.kvcache.hit_density import HitDensity
from dynamo.kvcache.retention import Retention
from dynamo.kvcache.reuse import ReuseTracker
from dynamo.kvcache.s3_fifo import S3Fifo

__all__ = ["AdmissionName", "BeginUse", "EvictionName", "Policies"]

EvictionName = Literal["hit_density", "lru", "s3_fifo"]
"""Least hit density, learned from the traffic; leaf-first LRU; S3-FIFO. All honour priorities and time to live."""

AdmissionName = Literal["always", "second_sighting", "adaptive"]
"""Every block; what was offered before; what promises more than its write costs."""

BeginUse = Callable[[list[BlockKey]], OpenUse]
"""Begins the use of a chain, given its keys so far."""


class Policies:
    """What the pools and sequences of one cache share.

    Attributes:
        admission: says what the tiers below the device take, under the lock of their books; None: everything.
    """

    def __init__(
        self,
        eviction: EvictionName = "lru",
        admission: AdmissionName = "always",
        *,
        write_budget: Callable[[], float] | None = None,
    ) -> None:
        """Makes the policies of these names.

        Args:
            write_budget: for adaptive admission, how tight the budget of disk writes is, from 0, not at all, to 1.

        Raises:
            CacheConfigError: there is no such policy, or the two do not go together.
        """
        for what, name, names in (
            ("eviction", eviction, get_args(EvictionName)),
            ("admission", admission, get_args(AdmissionName)),
        ):
            if name not in names:
                raise CacheConfigError(f"{name!r} is no policy of {what}; there are {', '.join(names)}")
        if admission == "adaptive" and eviction != "hit_density":
            raise CacheConfigError(
                f"adaptive admission goes by the prices of hit_density eviction, not of {eviction}; choose that as well"
            )
        self._eviction = eviction
        self._densities: dict[str, HitDensity] = {}
        self._tracker: UseTracker = UseCounter()
        self._reuse = ReuseTracker()
        if eviction != "lru":
            self._tracker = self._reuse
        self.admission: AdmissionPolicy | None = None
        if admission == "second_sighting":
            self.admission = SecondSighting()
        elif admission == "adaptive":
            self.admission = Adaptive(
                self._reuse, lambda tier, now_s: self._densities[tier].price(now_s), budget=write_budget
            )

    def new_order(self, tier: str) -> EvictionOrder:
        """The order of eviction for the pool of a tier."""
        if self._eviction == "hit_density":
            self._densities[tier] = HitDensity(self._reuse)
            return self._densities[tier]
        return Retention(S3Fifo if self._eviction == "s3_fifo" else LeafFirstLRU)

    def begin_use(self, num_prompt_tokens: int, priority: int, ttl_s: float | None) -> BeginUse:
        """What begins the use of a sequence."""
        expires_s = None if ttl_s is None else time.monotonic() + ttl_s
        return lambda keys: OpenUse(self._tracker, keys, num_prompt_tokens, priority=priority, expires_s=expires_s)
