"""The seam between a pool of slots and a policy that says which of its blocks go first.

A policy knows neither slots nor keys. It ranks *entries*: what one use of a chain left behind in one pool, which is the
blocks that this use was the last to touch. A pool gives blocks up from the tail of the entry ranked lowest, and passes over
an entry whose tail still has descendants in the pool, so that no block outlives its prefix.
"""

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import count
from typing import Protocol

__all__ = ["EvictionOrder", "LeafFirstLRU", "OpenUse", "Part", "Use", "UseCounter", "UseTracker", "anonymous_use"]


class Part(IntEnum):
    """Which part of its chain a use speaks for. The parts of one chain come back with different chances."""

    FRESH = 0  # blocks of the prompt that no earlier use had; or the whole chain, where it is not told apart
    KNOWN = 1  # blocks of the prompt that the use it continues had too
    ANSWER = 2  # blocks behind the prompt's last full one: lost where a template drops reasoning from the history
    SHARED = 3  # leading blocks that many chains have in common, such as a system prompt


@dataclass(frozen=True, slots=True)
class Use:
    """One request's use of a chain of blocks: all that a policy may know about it.

    Attributes:
        number: consecutive over all uses in one cache, from 1.
        time_s: when it began, on a monotonic clock.
        turn: how many earlier uses it continues: 0 for a chain of which nothing but shared prefixes was seen before.
        num_prompt_tokens: length of the prompt.
        num_output_tokens: length of the answer; 0 while it is not known.
        priority: entries of a higher priority outlive all those of a lower one.
        expires_s: from this time on the entry goes before all others; None: never.
        num_new_tokens: prompt tokens that the use it continues did not have; all of them in turn 0.
        part: what of the chain this is about; `reuse.parts` takes a use apart.
        num_shared_blocks: leading blocks that other chains have too.
        num_sharers: how many chains have been seen to go on from those blocks.
        num_known_blocks: leading blocks that the use it continues had, shared ones included.
        num_prompt_blocks: blocks of the chain before the answer; None: not known, all of them.
    """

    number: int
    time_s: float
    turn: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    priority: int = 0
    expires_s: float | None = None
    num_new_tokens: int = 0
    part: Part = Part.FRESH
    num_shared_blocks: int = 0
    num_sharers: int = 0
    num_known_blocks: int = 0
    num_prompt_blocks: int | None = None


def anonymous_use() -> Use:
    """A use now by nobody in particular: number 0, and no history."""
    return Use(0, time.monotonic())


class UseTracker(Protocol):
    """Who numbers the uses of a cache and learns from them. Thread-safe."""

    def observe(
        self,
        keys: Sequence[Hashable],
        now_s: float,
        *,
        num_prompt_tokens: int,
        priority: int = 0,
        expires_s: float | None = None,
    ) -> Use:
        """A use of a chain begins, of which `keys` are known so far."""

    def finish(self, use: Use, keys: Sequence[Hashable], num_output_tokens: int) -> Use:
        """A use ends: `keys` is its whole chain. Returns all that is known of the use now."""


class UseCounter:
    """Numbers uses, and learns nothing. Implements UseTracker."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def observe(
        self,
        keys: Sequence[Hashable],
        now_s: float,
        *,
        num_prompt_tokens: int,
        priority: int = 0,
        expires_s: float | None = None,
    ) -> Use:
        """A use of which nothing is known but what is given."""
        return Use(next(self._numbers), now_s, 0, num_prompt_tokens, priority=priority, expires_s=expires_s)

    def finish(self, use: Use, keys: Sequence[Hashable], num_output_tokens: int) -> Use:
        """The same use with the length of its answer."""
        return replace(use, num_output_tokens=num_output_tokens) if num_output_tokens else use


class OpenUse:
    """One sequence's use of its chain, for everybody who will file the chain's blocks, now or after the sequence ended.

    Attributes:
        latest: what is known of the use so far.
        admitted: by tier, how much of the chain was offered to it, and how many leading blocks it took or had.
    """

    def __init__(
        self,
        tracker: UseTracker,
        keys: Sequence[Hashable],
        num_prompt_tokens: int,
        *,
        priority: int = 0,
        expires_s: float | None = None,
    ) -> None:
        """Begins the use."""
        self._tracker = tracker
        self.admitted: dict[str, tuple[int, int]] = {}
        self.latest = tracker.observe(
            keys, time.monotonic(), num_prompt_tokens=num_prompt_tokens, priority=priority, expires_s=expires_s
        )

    def finish(self, keys: Sequence[Hashable], num_output_tokens: int) -> None:
        """Ends the use. Called once."""
        self.latest = self._tracker.finish(self.latest, keys, num_output_tokens)


class EvictionOrder(Protocol):
    """Order in which the entries of one pool give up blocks. Not thread-safe: it belongs to its pool.

    Entries are consecutive numbers that the pool gives, never used again.
    """

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        """A use left `num_blocks` idle blocks behind. Those that lay in earlier entries have left them."""

    def remove(self, entry: int) -> None:
        """The entry has no block left, by eviction or since later uses took them all. Unknown entries are ignored."""

    def candidates(self, now_s: float) -> Iterator[int]:
        """All entries in the order in which they are to give up blocks. Abandoned by the pool when it has enough; the pool
        calls neither `add` nor `remove` while it iterates."""


class LeafFirstLRU:
    """The entry used longest ago goes first. Implements EvictionOrder."""

    def __init__(self) -> None:
        # Not a dict, which gets slow to iterate as it loses its first entries.
        self._entries: OrderedDict[int, None] = OrderedDict()

    def add(self, entry: int, use: Use, num_blocks: int) -> None:
        """Files the entry behind all others."""
        self._entries[entry] = None

    def remove(self, entry: int) -> None:
        """Forgets the entry."""
        self._entries.pop(entry, None)

    def candidates(self, now_s: float) -> Iterator[int]:
        """Oldest first."""
        return iter(self._entries)
