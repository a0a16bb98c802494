"""Time to first token when the disk is slow: a cached prompt beside the same prompt computed.

Each round is a surprise: an engine that has seen the disk at full speed finds it throttled from one prompt to the next.
Prompts after the first meet a planner that knows. Computed and cached answers take turns, so that both see the same machine.

The throttle is a token bucket around `os.preadv`, without asynchronous I/O: the real disk tier reads a real file underneath.
"""

import asyncio
import errno
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dynamo.perf.harness import BenchmarkError
from dynamo.serve.assembly import Assembly, build_engine
from dynamo.serve.config import load_config
from dynamo.serve.engine.request import GenerationRequest, SamplingParams
from dynamo.tiers.aio import RequestQueue, Requests

__all__ = ["Throttle", "ThrottledTimes", "measure_throttled", "throttled_reads"]

_WARM_UP = 9_999  # number of a prompt that is not measured


class Throttle:
    """A token bucket. `bytes_per_s` may be changed at any time; None lets everything pass."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._lock = threading.Lock()
        self._free_s = 0.0  # when all that was let through so far is paid for

    def pay(self, num_bytes: int) -> None:
        """Returns when `num_bytes` more may have passed."""
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            self._free_s = max(time.monotonic(), self._free_s) + num_bytes / rate
            wait_s = self._free_s - time.monotonic()
        time.sleep(max(0.0, wait_s))


@contextmanager
def throttled_reads() -> Iterator[Throttle]:
    """Makes all vectored reads of this process pay, until the end of the block."""
    throttle = Throttle()
    read, submit = os.preadv, RequestQueue.submit

    def refuse(queue: RequestQueue, requests: Requests, start: int, stop: int) -> int:
        raise OSError(errno.ENOSYS, "throttled reads are calls of preadv")

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int, flags: int = 0) -> int:
        count = read(fd, buffers, offset, flags)
        throttle.pay(count)
        return count

    os.preadv = preadv  # type: ignore[assignment]
    RequestQueue.submit = refuse  # type: ignore[method-assign, assignment]
    try:
        yield throttle
    finally:
        os.preadv = read
        RequestQueue.submit = submit  # type: ignore[method-assign]


@dataclass(slots=True)
class ThrottledTimes:
    """Seconds to the first token, one entry per pair of answers.

    Attributes:
        computed_s: with nothing cached.
        cached_s: with the whole prompt on disk.
        num_cached_tokens: of those came from the cache.
        decisions: of the cache's planner, by kind, while the disk was throttled.
        regret_s: as the planner sees it afterwards.
    """

    computed_s: list[float] = field(default_factory=list)
    cached_s: list[float] = field(default_factory=list)
    num_cached_tokens: list[int] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    regret_s: float = 0.0


def measure_throttled(
    flags: dict[str, str],
    folder: Path,
    throttle: Throttle,
    *,
    bytes_per_s: float | None,
    prompt_tokens: int,
    rounds: int,
    prompts_after: int,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[ThrottledTimes, ThrottledTimes]:
    """Measures in this process, with the engine of the given settings.

    Args:
        flags: settings by "section.key"; the caches are set here.
        folder: an empty one for the disk tier.
        throttle: in force on this process's reads.
        bytes_per_s: of the disk after the throttle falls; None: it does not.
        rounds: surprises.
        prompts_after: further prompts in each round, after the surprise.

    Returns:
        The first prompts after the throttle fell, and the further ones.

    Raises:
        BenchmarkError: a prompt that should be on disk is not.
    """
    settings = flags | {"cache.disk_cache": f"{folder}/kv:4GiB", "cache.host_cache": "1GiB"}
    sudden, known = ThrottledTimes(), ThrottledTimes()
    throttle.bytes_per_s = None

    async def store() -> None:
        bench = _Bench(settings, prompt_tokens)
        await bench.engine.start()
        try:
            for number in (_WARM_UP, *range(1 + prompts_after)):
                await bench.first_token_s(number, "kept")
            bench.displace()
        finally:
            await bench.engine.stop()

    async def surprise(round_number: int) -> None:
        bench = _Bench(settings, prompt_tokens)
        await bench.engine.start()
        try:
            for salt in ("before", "kept", "kept"):  # computed, and from the disk at full speed
                await bench.first_token_s(_WARM_UP, f"{salt}-{round_number}" if salt == "before" else salt)
                bench.displace()
            throttle.bytes_per_s = bytes_per_s
            for number in range(1 + prompts_after):
                await bench.add_pair(known if number else sudden, number, round_number)
        finally:
            throttle.bytes_per_s = None
            await bench.engine.stop()

    asyncio.run(store())
    for round_number in range(rounds):
        progress(f"round {round_number + 1} of {rounds}")
        asyncio.run(surprise(round_number))
    return sudden, known


class _Bench:
    def __init__(self, settings: dict[str, str], prompt_tokens: int) -> None:
        assembly: Assembly = build_engine(load_config(None, settings, {}).config, lambda share: None)
        self.engine = assembly.engine
        self._cache = assembly.cache
        self._prompt_tokens = prompt_tokens
        self._num_requests = 0
        self.num_cached_tokens = 0

    async def first_token_s(self, number: int, salt: str) -> float:
        """Asks for one token after the prompt of that number."""
        self._num_requests += 1
        prompt = random.Random(number).choices(range(300, 2000), k=self._prompt_tokens)
        request = GenerationRequest(
            request_id=str(self._num_requests),
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True),
            cache_salt=salt,
        )
        started_s = time.perf_counter()
        taken_s = 0.0
        async for deltas in self.engine.generate(request):
            taken_s = taken_s or time.perf_counter() - started_s
            self.num_cached_tokens = deltas[-1].num_cached_tokens
        return taken_s

    async def add_pair(self, times: ThrottledTimes, number: int, round_number: int) -> None:
        """Measures one prompt computed and cached, in an order that changes."""
        prompt = random.Random(number).choices(range(300, 2000), k=self._prompt_tokens)
        salts = (f"fresh-{round_number}", "kept")
        for salt in salts if (number + round_number) % 2 else reversed(salts):
            self.displace()
            held = self._cache.lookup(prompt, salt=salt)
            before = self._cache.stats().planner
            taken_s = await self.first_token_s(number, salt)
            if salt != "kept":
                times.computed_s.append(taken_s)
                continue
            if held.disk_tokens < self._prompt_tokens - self._cache.block_size or held.host_tokens:
                raise BenchmarkError(f"the prompt should lie on disk only, and lies elsewhere: {held}")
            after = self._cache.stats().planner
            times.cached_s.append(taken_s)
            times.num_cached_tokens.append(self.num_cached_tokens)
            times.decisions += Counter(after.decisions) - Counter(before.decisions)
            times.regret_s += sum(after.regret_s.values()) - sum(before.regret_s.values())

    def displace(self) -> None:
        """Leaves everything on disk only, with nothing going on."""
        deadline = time.monotonic() + 60.0
        self._cache.flush()
        while time.monotonic() < deadline:
            self._cache.clear("device")
            self._cache.clear("host")
            usage = self._cache.stats()
            if not any(usage.tier(tier).num_cached_blocks for tier in ("device", "host")):
                return
            time.sleep(0.01)  # reads of a load that was given up still hold their rows
        raise BenchmarkError("blocks are still held by reads after a minute")
