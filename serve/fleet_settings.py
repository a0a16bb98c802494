"""Settings of a server of several processes: which there are, and how the front chooses among the workers."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from dynamo.router.config import AFFINITIES, MODES, Affinity, Mode, RouterConfig
from dynamo.serve.options import (
    EventSource,
    Notation,
    event_source,
    folder_path,
    number,
    one_of,
    option,
    or_word,
    several,
)

__all__ = ["FleetSettings", "RouterSettings", "router_config"]

_OFF = "off"
_AUTO = "auto"
_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_URL = re.compile(r"https?://[^\s/,?#]+(/[^\s?#]*)?")


def _parse_worker_id(value: Any) -> str:
    # It names files and folders, and stands in headers and metrics.
    if isinstance(value, str) and _WORKER_ID.fullmatch(value):
        return value
    raise ValueError("1 to 64 letters, digits, '.', '_' or '-', of which a letter or digit comes first")


def _parse_url(value: Any) -> str:
    if isinstance(value, str) and _URL.fullmatch(value) and _has_host_and_port(value):
        return value.rstrip("/")
    raise ValueError("an address such as http://127.0.0.1:8001")


def _has_host_and_port(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port, or no address in brackets
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """The processes of a server, and where they find each other."""

    workers: int | None = option(
        None,
        "processes that compute, each with tiers of its own of the sizes given; off: this process does all",
        or_word(number(int, 1, 64), _OFF),
        metavar="N",
    )
    discovery: Path | None = option(  # noqa: RUF009  # a field's declaration, made once
        None,
        "folder where workers register and fronts look for them; auto: a private one of --workers",
        or_word(folder_path, _AUTO),
        metavar="DIR",
    )
    worker_id: str | None = option(
        None,
        "a worker's name; auto: worker-0, or the first number that is free in --discovery",
        or_word(Notation(_parse_worker_id), _AUTO),
        metavar="NAME",
    )
    external: tuple[str, ...] = option(
        (), "OpenAI server of another make that serves the same model", several(Notation(_parse_url)), metavar="URL"
    )
    kv_events: tuple[EventSource | None, ...] = option(
        (),
        "where each --external, in their order, publishes KV events as vLLM does, a replay socket after a comma; off: nowhere",
        several(event_source),
        metavar="ENDPOINT[,REPLAY]",
    )


_DEFAULTS: Final = RouterConfig()
_SECONDS = number(float, 1e-3, 1e7)
_SECONDS_OR_NONE = number(float, 0, 1e7)
_WEIGHT = number(float, 0, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How the front chooses a worker. What they do exactly stands at `dynamo.router.config.RouterConfig`."""

    mode: Mode = option(  # noqa: RUF009  # a field's declaration, made once
        _DEFAULTS.mode,
        "kv: soonest first token by prefix and load; or round-robin, random, least-loaded, direct (the request says)",
        one_of(*MODES),
        metavar="MODE",
        flag="--router-mode",
    )
    temperature: float = option(
        _DEFAULTS.temperature,
        "above 0, how much chance decides between workers of unlike cost",
        _WEIGHT,
        metavar="NUMBER",
        flag="--router-temperature",
    )
    queue_weight: float = option(
        _DEFAULTS.queue_weight,
        "weight of the time that a worker's queue takes",
        _WEIGHT,
        metavar="NUMBER",
        flag="--router-queue-weight",
    )
    prefix_weight: float = option(
        _DEFAULTS.prefix_weight,
        "weight of the time that a prefix at a worker saves, 0 to 1",
        number(float, 0, 1),
        metavar="NUMBER",
        flag="--router-prefix-weight",
    )
    decode_weight: float = option(
        _DEFAULTS.decode_weight,
        "weight of the blocks that running requests hold at a worker",
        _WEIGHT,
        metavar="NUMBER",
        flag="--router-decode-weight",
    )
    balance_weight: float = option(
        _DEFAULTS.balance_weight,
        "how much a worker that computed more than its share lately is spared, 0 to 1",
        number(float, 0, 1),
        metavar="NUMBER",
        flag="--router-balance-weight",
    )
    prediction_ttl: float = option(
        _DEFAULTS.prediction_ttl_s,
        "seconds that a routed prompt counts as present before its worker says so",
        _SECONDS_OR_NONE,
        metavar="SECONDS",
        flag="--router-prediction-ttl",
    )
    approximate_ttl: float = option(
        _DEFAULTS.approximate_ttl_s,
        "the same at workers that publish no KV events",
        _SECONDS,
        metavar="SECONDS",
        flag="--router-approximate-ttl",
    )
    affinity: Affinity = option(  # noqa: RUF009  # a field's declaration, made once
        _DEFAULTS.affinity,
        "of requests with a session id: off, soft (unless another worker is clearly cheaper) or hard",
        one_of(*AFFINITIES),
        metavar="KIND",
        flag="--router-affinity",
    )
    session_ttl: float = option(
        _DEFAULTS.session_ttl_s,
        "seconds after which an unused session is forgotten",
        _SECONDS,
        metavar="SECONDS",
        flag="--router-session-ttl",
    )
    busy_requests: float = option(
        _DEFAULTS.busy_requests,
        "a worker is busy with so many times --max-running requests; 0: never",
        _WEIGHT,
        metavar="FACTOR",
        flag="--router-busy-requests",
    )
    busy_queue: float = option(
        _DEFAULTS.busy_queue_s,
        "a worker is busy when the requests ahead take so long; 0: never",
        _SECONDS_OR_NONE,
        metavar="SECONDS",
        flag="--router-busy-queue",
    )
    busy_blocks: float = option(
        _DEFAULTS.busy_blocks,
        "a worker is busy when running requests hold so much of its device tier; 0: never",
        _WEIGHT,
        metavar="SHARE",
        flag="--router-busy-blocks",
    )
    max_waiting: int = option(
        _DEFAULTS.max_waiting,
        "most requests that wait for a worker that is not busy; more are refused with 429",
        number(int, 0, 2**20),
        metavar="N",
        flag="--router-max-waiting",
    )
    waiting_timeout: float = option(
        _DEFAULTS.waiting_timeout_s,
        "seconds that a request waits for such a worker at most",
        _SECONDS,
        metavar="SECONDS",
        flag="--router-waiting-timeout",
    )
    no_worker_timeout: float = option(
        10.0,
        "seconds that a request waits where no worker may take it, such as while one is restarted; then 503",
        _SECONDS_OR_NONE,
        metavar="SECONDS",
    )
    migration_limit: int = option(
        3,
        "how often a request is carried on at another worker when the one it runs on is lost",
        number(int, 0, 100),
        metavar="N",
    )


def router_config(settings: RouterSettings, front_id: str) -> RouterConfig:
    """The router's own form of the settings.

    Args:
        front_id: see `RouterConfig`.
    """
    return RouterConfig(
        mode=settings.mode,
        temperature=settings.temperature,
        queue_weight=settings.queue_weight,
        prefix_weight=settings.prefix_weight,
        decode_weight=settings.decode_weight,
        balance_weight=settings.balance_weight,
        prediction_ttl_s=settings.prediction_ttl,
        approximate_ttl_s=settings.approximate_ttl,
        affinity=settings.affinity,
        session_ttl_s=settings.session_ttl,
        busy_requests=settings.busy_requests,
        busy_queue_s=settings.busy_queue,
        busy_blocks=settings.busy_blocks,
        max_waiting=settings.max_waiting,
        waiting_timeout_s=settings.waiting_timeout,
        front_id=front_id,
    )
