"""Settings of the router."""

import math
from dataclasses import dataclass
from typing import Final, Literal, get_args

from dynamo.router.errors import RouterConfigError

__all__ = ["AFFINITIES", "MODES", "Affinity", "Mode", "RouterConfig"]

Mode = Literal["kv", "round-robin", "random", "least-loaded", "direct"]
Affinity = Literal["off", "soft", "hard"]

MODES: Final[tuple[str, ...]] = get_args(Mode)
AFFINITIES: Final[tuple[str, ...]] = get_args(Affinity)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """How workers are chosen. Times are in seconds.

    Attributes:
        mode: kv: lowest expected cost, from where the prefix lies and from load; round-robin: in turn; random: any;
            least-loaded: lowest expected wait; direct: the worker that the request names. Pins, exclusions, drained workers,
            workers set aside and busy thresholds count in all modes.
        queue_weight: of the seconds that the requests ahead at a worker take. Below 1, since to wait where a prefix lies is
            better for all than to compute it elsewhere, which makes others wait and evicts what they would find.
        prefix_weight: of the seconds that a prefix found at a worker saves, 0 to 1; 0 ignores prefixes.
        decode_weight: of the blocks that running requests hold at a worker, each as costly as so much of a block to be
            computed. Higher values even out decoding, and break up prefixes.
        balance_weight: how much dearer computing is at a worker that was given twice its share of it in the last two minutes;
            0: not at all. Keeps a common prefix from drawing all requests to one worker while there is little to do.
        temperature: 0: the lowest cost wins, ties at random; above: drawn at random with weights exp(-cost / (range *
            temperature)), where range is the highest cost less the lowest.
        prediction_ttl_s: how long the prompt of a routed request counts as present at its worker before the worker says so,
            so that requests with a common prefix that arrive together land together; 0: not at all.
        approximate_ttl_s: the same for workers without events, of which nothing else is known.
        affinity: of requests with a session id: off: ignored; soft: they stay with the session's worker unless another is
            cheaper by more than `session_slack_s`; hard: as long as that worker takes requests and is not busy.
        session_ttl_s: how long a session without requests is remembered.
        session_slack_s: what a soft session may cost more at its worker.
        max_sessions: remembered at most; the one longest unused is forgotten first.
        busy_requests: a worker is busy with this many times `max_running` requests; 0: never for their number. With 4, three
            full batches wait in the engine before the router holds requests back.
        busy_queue_s: a worker is busy when the requests ahead take as long; 0: never for that.
        busy_blocks: a worker is busy when running requests hold more than this share of its device blocks; 0: never for that.
        max_waiting: requests in the waiting room.
        waiting_timeout_s: how long a request waits there unless it says otherwise.
        set_aside_s: how long a worker that failed gets no requests while there are others.
        booking_expiry_s: a booking of which nothing was heard for so long is released, and a warning logged.
        front_id: this front's name in load events, so that its own requests are not counted twice.
    """

    mode: Mode = "kv"
    queue_weight: float = 0.5
    prefix_weight: float = 1.0
    decode_weight: float = 0.05
    balance_weight: float = 0.4
    temperature: float = 0.0
    prediction_ttl_s: float = 10.0
    approximate_ttl_s: float = 120.0
    affinity: Affinity = "soft"
    session_ttl_s: float = 600.0
    session_slack_s: float = 1.0
    max_sessions: int = 100_000
    busy_requests: float = 4.0
    busy_queue_s: float = 0.0
    busy_blocks: float = 0.0
    max_waiting: int = 1024
    waiting_timeout_s: float = 60.0
    set_aside_s: float = 5.0
    booking_expiry_s: float = 600.0
    front_id: str = ""

    def __post_init__(self) -> None:
        """Checks all settings.

        Raises:
            RouterConfigError: one is wrong.
        """
        _check_choice("mode", self.mode, MODES)
        _check_choice("affinity", self.affinity, AFFINITIES)
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise RouterConfigError(f"{name} must be a finite number from 0 on, not {value}")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise RouterConfigError(f"{name} must be a finite number above 0, not {value}")
        for name in ("prefix_weight", "balance_weight"):
            if getattr(self, name) > 1:
                raise RouterConfigError(f"{name} must be from 0 to 1, not {getattr(self, name)}")


_NOT_NEGATIVE = (
    "queue_weight",
    "prefix_weight",
    "decode_weight",
    "balance_weight",
    "temperature",
    "prediction_ttl_s",
    "session_slack_s",
    "busy_requests",
    "busy_queue_s",
    "busy_blocks",
    "max_waiting",
    "set_aside_s",
)
_POSITIVE = ("approximate_ttl_s", "session_ttl_s", "max_sessions", "waiting_timeout_s", "booking_expiry_s")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RouterConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
