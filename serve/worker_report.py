"""What a worker tells fronts of itself: once, when it registers, and then every second."""

import dataclasses
from typing import TYPE_CHECKING

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.workers import LoadReport, WorkerCard
from dynamo.serve.config import EngineSettings

if TYPE_CHECKING:
    from dynamo.kvcache import KVCache
    from dynamo.serve.engine.engine import InferenceEngine

__all__ = ["load_report", "worker_card"]


def worker_card(
    cache: "KVCache", engine: "InferenceEngine", settings: EngineSettings, *, worker_id: str, epoch: int, model: str
) -> WorkerCard:
    """The worker's capacities.

    Args:
        epoch: see `WorkerCard`.
        model: the name clients use.
    """
    return WorkerCard(
        worker_id=worker_id,
        epoch=epoch,
        model=model,
        fingerprint=cache.spec.fingerprint.hex(),
        hash_version=HASH_VERSION,
        block_size=cache.block_size,
        block_bytes=cache.spec.layout.slot_bytes,
        num_blocks={tier.tier: tier.num_slots for tier in cache.stats().tiers},
        max_model_len=engine.max_model_len,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
    )


def load_report(cache: "KVCache", engine: "InferenceEngine") -> LoadReport:
    """What there is to do and how fast it goes; the counters are those of `EngineStats`, by their names there."""
    stats = engine.stats()
    cached = cache.stats()
    planner = cached.planner
    block_bytes = cache.spec.layout.slot_bytes
    return LoadReport(
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        prefill_tokens_waiting=engine.num_prefill_tokens_waiting,
        used_blocks={
            tier.tier: tier.num_pinned_blocks if tier.tier == "device" else tier.num_cached_blocks
            for tier in cached.tiers
        },
        prefill_tokens_per_s=planner.prefill_tokens_per_s,
        load_blocks_per_s={tier: speed / block_bytes for tier, speed in planner.lane_bytes_per_s.items()},
        counters=dataclasses.asdict(stats),
    )
