"""What workers say of themselves: once, every second, and of each request. Plain types, so that msgspec encodes them."""

from dataclasses import dataclass, field
from typing import Literal

from dynamo.kvcache.hashing import HASH_VERSION
from dynamo.router.errors import IncompatibleWorkerError

__all__ = ["LoadEvent", "LoadKind", "LoadReport", "WorkerCard", "check_card"]

LoadKind = Literal["added", "first-token", "freed", "front-gone"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCard:
    """What a worker says of itself once, when it joins.

    Attributes:
        worker_id: unique name, such as "worker-0".
        epoch: number of this incarnation, rising (time in ns at its start); a card with another one replaces the worker's
            blocks and load.
        model: name of the model.
        fingerprint: hex of the bytes its block keys are rooted in, as `KVSpec.fingerprint`; equal ones name equal blocks.
        hash_version: of the block keys, `kvcache.hashing.HASH_VERSION`.
        block_size: tokens of a block.
        block_bytes: of a block; 0 where unknown.
        num_blocks: places by tier; absent tiers have none. An absent device is of unknown size.
        max_model_len: most tokens of a request, prompt and output; 0 where unknown.
        max_running: most sequences generating at the same time; 0 where unknown.
        max_batch_tokens: most tokens of an engine step; 0 where unknown.
        has_events: whether it says what it holds. If not, the router assumes what it sent there to stay for a time.
    """

    worker_id: str
    epoch: int
    model: str
    fingerprint: str
    hash_version: int
    block_size: int
    block_bytes: int = 0
    num_blocks: dict[str, int] = field(default_factory=dict)
    max_model_len: int = 0
    max_running: int = 0
    max_batch_tokens: int = 0
    has_events: bool = True


def check_card(card: WorkerCard) -> None:
    """Refuses the card of a worker that this release cannot route to.

    Raises:
        IncompatibleWorkerError: the message says why.
    """
    if card.hash_version != HASH_VERSION:
        raise IncompatibleWorkerError(
            f"worker {card.worker_id!r} makes block keys of version {card.hash_version}, and this router of version "
            f"{HASH_VERSION}: run the same release of both"
        )
    if card.block_size < 1:
        raise IncompatibleWorkerError(
            f"worker {card.worker_id!r} has blocks of {card.block_size} tokens: they need 1 at least"
        )
    try:
        bytes.fromhex(card.fingerprint)
    except ValueError:
        raise IncompatibleWorkerError(
            f"worker {card.worker_id!r} has the fingerprint {card.fingerprint!r}, which is not hexadecimal"
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What a worker says of itself once a second, and with every change that matters.

    Attributes:
        num_running: sequences that generate.
        num_waiting: requests that wait inside the worker.
        prefill_tokens_waiting: prompt tokens still to be computed, of waiting and running requests.
        used_blocks: by tier. On the device only what running requests hold: blocks that merely are cached are room.
        prefill_tokens_per_s: measured speed of computing prompts; None before it was measured.
        load_blocks_per_s: measured speed of getting blocks back, by tier ("host", "disk", "remote"), where measured.
        counters: of the engine since its start, for the front's metrics. The router reads none.
    """

    num_running: int
    num_waiting: int
    prefill_tokens_waiting: int
    used_blocks: dict[str, int] = field(default_factory=dict)
    prefill_tokens_per_s: float | None = None
    load_blocks_per_s: dict[str, float] = field(default_factory=dict)
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadEvent:
    """What a worker says of one request of some front, to all fronts.

    Attributes:
        kind: "added" when it came, "first-token" when its prompt is computed, "freed" when it ended in whatever way, and
            "front-gone" when a front's session ended, which ends all its requests.
        front_id: whose request it is.
        request_id: unique for that front; "" for "front-gone".
        prefill_tokens: prompt tokens to be computed, for "added".
        num_blocks: blocks it holds on the device, for "added".
    """

    kind: LoadKind
    front_id: str
    request_id: str = ""
    prefill_tokens: int = 0
    num_blocks: int = 0
