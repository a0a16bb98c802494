"""A router on a clock of the test's own, and short ways to say what is asked of it."""

import random

import pytest

from dynamo.kvcache.hashing import HASH_VERSION, block_keys, chain_root, pack_tokens
from dynamo.router.config import RouterConfig
from dynamo.router.router import RouteQuery, Router
from dynamo.router.workers import WorkerCard

FINGERPRINT = b"some model"
BLOCK_SIZE = 16


class Clock:
    """Stands still until it is told otherwise."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Fleet:
    """A router whose workers are named w0, w1, ... and have blocks of 16 tokens."""

    def __init__(self, num_workers: int = 0, *, seed: int = 0, **settings) -> None:
        self.clock = Clock()
        self.router = Router(RouterConfig(**settings), clock=self.clock, rng=random.Random(seed))
        self.slots = {f"w{n}": self.join(f"w{n}") for n in range(num_workers)}

    def join(self, worker_id: str, **facts) -> int:
        card = {
            "epoch": 1,
            "model": "model",
            "fingerprint": FINGERPRINT.hex(),
            "hash_version": HASH_VERSION,
            "block_size": BLOCK_SIZE,
        } | facts
        return self.router.join(WorkerCard(worker_id=worker_id, **card))

    def query(self, tokens, request_id: str = "r", **wishes) -> RouteQuery:
        return RouteQuery(tokens=pack_tokens(list(tokens)), request_id=request_id, **wishes)

    def route(self, tokens, **wishes):
        return self.router.route(self.query(tokens, **wishes))

    def hold(self, worker_id: str, tokens, tier: str = "device", **root) -> None:
        """The worker says that it holds all full blocks of the tokens."""
        keys = block_keys(list(tokens), BLOCK_SIZE, chain_root(FINGERPRINT, BLOCK_SIZE, **root))
        self.router.index.stored(self.slots[worker_id], tier, [int.from_bytes(key[:8], "little") for key in keys], None)

    def load(self, worker_id: str):
        return next(worker for worker in self.router.stats().workers if worker.worker_id == worker_id)


@pytest.fixture(scope="session")
def make_fleet():
    return Fleet
