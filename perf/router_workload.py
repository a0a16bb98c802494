"""What `dynamo.perf router` puts into both indexes: events of many workers, and prompts with known holders."""

import json
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["BLOCK_SIZE", "CASES", "CHAIN_BLOCKS", "Prompt", "RouterWorkload"]

BLOCK_SIZE = 16
CHAIN_BLOCKS = 256

CASES = ("hit", "partial", "worst", "miss")
"""hit: 8 workers at 8 depths, one of them at the end; partial: the same over the first quarter; worst: every worker at a depth
of its own; miss: nobody."""

_NUM_SHARERS = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and who holds how much of it.

    Attributes:
        tokens: u32.
        depths: leading blocks by worker.
    """

    case: str
    num_blocks: int
    tokens: "array[int]"
    depths: dict[int, int]


@dataclass(frozen=True, slots=True)
class RouterWorkload:
    """Chains of 256 blocks, half of them held by one worker and half by 8, in a random order of workers; and prompts.

    Attributes:
        events: (worker, chain) of each store event.
        chains: u64 keys, one chain after the other.
    """

    num_workers: int
    events: Sequence[tuple[int, int]]
    chains: "array[int]"
    prompts: Sequence[Prompt]

    @classmethod
    def make(cls, num_workers: int, num_blocks: int, prompt_blocks: Sequence[int]) -> "RouterWorkload":
        """The same for the same arguments.

        Args:
            num_blocks: (worker, block) pairs, rounded down to whole chains.
        """
        chooser = random.Random(1)
        num_events = num_blocks // CHAIN_BLOCKS
        sharers = min(_NUM_SHARERS, num_workers)
        events: list[tuple[int, int]] = []
        chain = 0
        while len(events) < num_events:
            is_shared = len(events) % (2 * sharers) >= sharers
            holders = chooser.sample(range(num_workers), sharers if is_shared else 1)
            events += [(worker, chain) for worker in holders]
            chain += 1
        del events[num_events:]
        chooser.shuffle(events)
        keys = array("Q", np.random.default_rng(1).bytes(8 * CHAIN_BLOCKS * chain))
        prompts = [_prompt(case, blocks, num_workers) for blocks in prompt_blocks for case in CASES]
        return cls(num_workers, events, keys, prompts)

    @property
    def num_blocks(self) -> int:
        """(worker, block) pairs."""
        return CHAIN_BLOCKS * len(self.events)

    @property
    def num_different(self) -> int:
        """Different blocks."""
        return CHAIN_BLOCKS * len({chain for _, chain in self.events})

    def batches(self, num_events: int) -> Iterator[list[tuple[int, list[int]]]]:
        """(worker, keys) of so many events at a time; the keys are made when asked for, as if they came from the wire."""
        for start in range(0, len(self.events), num_events):
            yield [(worker, self.keys_of(chain)) for worker, chain in self.events[start : start + num_events]]

    def keys_of(self, chain: int) -> list[int]:
        """Keys of one chain."""
        return self.chains[CHAIN_BLOCKS * chain : CHAIN_BLOCKS * (chain + 1)].tolist()

    def write(self, path: Path) -> None:
        """For the peer: a line of JSON, then all chains' keys and all prompts' tokens, in native order."""
        head = {
            "block_size": BLOCK_SIZE,
            "chain_blocks": CHAIN_BLOCKS,
            "num_keys": len(self.chains),
            "events": self.events,
            "prompts": [{"num_blocks": p.num_blocks, "depths": list(p.depths.items())} for p in self.prompts],
        }
        with path.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            self.chains.tofile(file)
            for prompt in self.prompts:
                prompt.tokens.tofile(file)


def _prompt(case: str, num_blocks: int, num_workers: int) -> Prompt:
    holders = {"hit": 8, "partial": 8, "worst": num_workers, "miss": 0}[case]
    holders = min(holders, num_workers)
    deepest = num_blocks // 4 if case == "partial" else num_blocks
    workers = range(0, num_workers, num_workers // holders) if holders else ()
    depths = {worker: max(1, deepest * (i + 1) // holders) for i, worker in enumerate(workers) if i < holders}
    generator = np.random.default_rng((num_blocks, CASES.index(case)))
    tokens = array("I", generator.integers(0, 1 << 17, num_blocks * BLOCK_SIZE, dtype=np.uint32).tobytes())
    return Prompt(case, num_blocks, tokens, depths)
