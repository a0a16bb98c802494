"""What the server prints when it is ready: what it serves, from where to where, and a line to paste."""

import json
import shlex
from collections.abc import Sequence
from typing import Final

from dynamo.kvcache.config import format_size
from dynamo.kvcache.stats import CacheStats
from dynamo.router.workers import WorkerCard
from dynamo.serve.config import API_KEY_VARIABLE, ServerSettings
from dynamo.serve.served_model import ModelSummary, ServedModel

__all__ = ["render_banner", "render_fleet_banner", "server_url"]

_PATHS: Final = "API under /v1, docs at /docs, metrics at /metrics"


def server_url(host: str, port: int) -> str:
    """The address as a client of this machine would write it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def render_banner(
    summary: ModelSummary, model_name: str, max_model_len: int, stats: CacheStats, server: ServerSettings, url: str
) -> str:
    """Lines for people; the last one is a command that works as it stands."""
    parameters = "" if summary.num_parameters is None else f", {_count(summary.num_parameters)} parameters"
    rows = [
        ("model", f"{summary.description}{parameters}"),
        ("runs on", f"{summary.device}, {summary.dtype}"),
        ("context", f"{max_model_len} tokens"),
        *(
            (
                f"{tier.tier} tier",
                f"{format_size(tier.num_slots * tier.slot_bytes)}, {tier.num_slots} blocks, {tier.path}"
                if tier.num_slots
                else "none, see the log",
            )
            for tier in stats.tiers
        ),
        ("listening", f"{url}  ({_PATHS})"),
    ]
    return _render(rows, model_name, server, url)


def render_fleet_banner(
    description: str,
    served: ServedModel,
    cards: Sequence[WorkerCard],
    server: ServerSettings,
    url: str,
) -> str:
    """The same for a front and the workers it has now."""
    rows = [
        ("model", description),
        ("context", f"{served.max_model_len} tokens"),
        ("workers", str(len(cards)) if cards else "none yet; requests wait for one"),
        *(
            (card.worker_id, _tiers(card))
            for card in sorted(cards, key=lambda card: (len(card.worker_id), card.worker_id))
        ),
        ("listening", f"{url}  ({_PATHS})"),
    ]
    return _render(rows, served.name, server, url)


def _tiers(card: WorkerCard) -> str:
    if not card.block_bytes or not card.num_blocks:
        return "an engine of another make"
    # A tier that was asked for and is not there is said so at the worker, once, and would be overlooked.
    return ", ".join(
        f"{tier} {format_size(count * card.block_bytes)}" if count else f"no {tier} tier, see the log"
        for tier, count in card.num_blocks.items()
    )


def _render(rows: Sequence[tuple[str, str]], model_name: str, server: ServerSettings, url: str) -> str:
    lines = [f"  {name:<12} {value}" for name, value in rows]
    return "\n".join(["", "Dynamo KV is ready", *lines, "", f"  {_curl(model_name, server, url)}", ""])


def _curl(model_name: str, server: ServerSettings, url: str) -> str:
    body = json.dumps(
        {"model": model_name, "messages": [{"role": "user", "content": "What does os.path.join do?"}], "stream": True},
        ensure_ascii=False,
    )
    key = "" if server.api_key is None else f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"'
    headers = f"-H 'Content-Type: application/json'{key}"
    return f"curl -N {shlex.quote(url + '/v1/chat/completions')} {headers} -d {shlex.quote(body)}"


def _count(number: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
