from dataclasses import fields
from typing import Any

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.router.feed import FeedStats
from dynamo.router.subscriber import SubscriberStats
from dynamo.router.workers import LoadReport
from dynamo.serve.errors import EngineOverloadedError, WorkerLostError
from dynamo.serve.fleet import MemberStats
from dynamo.serve.router_metrics import RouterCollector

COMPLETION = {"model": "scripted", "prompt": "abcdefgh", "max_tokens": 8, "temperature": 0}


def numbered(kind: Any, first: int, **given: Any) -> Any:
    """A record whose numbers all differ."""
    names = [field.name for field in fields(kind) if field.name not in given]
    return kind(**{name: first + place for place, name in enumerate(names)}, **given)


FEED = numbered(
    SubscriberStats,
    200,
    feed=numbered(FeedStats, 100, last_heard_s=None, is_in_sync=True),
    is_connected=True,
    is_silent=False,
)
REPORT = LoadReport(
    num_running=3,
    num_waiting=2,
    prefill_tokens_waiting=7,
    used_blocks={"device": 5, "host": 6},
    prefill_tokens_per_s=1000.0,
    load_blocks_per_s={"host": 50.0},
)


def samples(front: Any, members: tuple[MemberStats, ...] = ()) -> dict[tuple[str, tuple[str, ...]], float]:
    registry = CollectorRegistry()
    registry.register(collector(front, members))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(s.name.removeprefix("dynamo_"), tuple(s.labels.values())): s.value for f in families for s in f.samples}


def collector(front: Any, members: tuple[MemberStats, ...] = ()) -> RouterCollector:
    return RouterCollector(
        front.router.stats, front.room.stats, lambda: members, front.engine.migrations, migration_limit=3
    )


def test_choices_and_what_became_of_them_are_counted(serve: Any, worker: Any, house: Any) -> None:
    front = house(
        worker("a", [(3, WorkerLostError("a", "gone"))], cached=4),
        worker("b", [(0, EngineOverloadedError("full"))], cached=4),
        worker("c", [(0, WorkerLostError("c", "gone"))], cached=4),
        worker("d", cached=4),
        mode="round-robin",
    )
    server = serve(front.engine, routed=front.engine, collectors=[collector(front)])
    for _ in range(2):
        assert httpx.post(server.url + "/v1/completions", json=COMPLETION, timeout=10).status_code == 200
    values = samples(front)
    assert sum(count for (name, _), count in values.items() if name == "router_decisions_total") == 5
    assert values["router_overhead_seconds_count", ("total",)] == 5
    assert values["router_overhead_seconds_bucket", ("+Inf", "hash")] == 5
    assert {phase: values["migration_lost_total", (phase,)] for phase in ("new", "ongoing")} == {"new": 0, "ongoing": 2}
    assert values["migration_succeeded_total", ("ongoing",)] == 1
    assert values["migration_refused_total", ("overloaded",)] == 1
    assert values["migration_exhausted_total", ("ongoing",)] == 0
    assert values["migration_duration_seconds_count", ()] == 1
    assert values["migration_limit", ()] == 3
    assert values["router_workers_set_aside_total", ()] == 2
    assert values["router_answered_cached_tokens_total", ()] == 4, "what carry-ons find is not compared"
    assert values["waiting_room_outcomes_total", ("at-once",)] == 5
    assert {values["worker_set_aside", (name,)] for name in "ac"} == {1}
    assert sum(values["worker_chosen_total", (name,)] for name in "abcd") == 5
    assert "dynamo_router_decisions_total" in httpx.get(server.url + "/metrics").text


def test_workers_and_feeds_are_told_apart(worker: Any, house: Any) -> None:
    front = house(worker("a"), worker("b"))
    front.router.index.stored(front.router.join(front.workers.card("b")), "host", [1, 2, 3], None)
    members = (
        MemberStats(worker_id="a", epoch=1, is_ready=True, report=REPORT, feed=FEED),
        MemberStats(worker_id="b", epoch=1, is_ready=False, report=None, feed=None),
    )
    values = samples(front, members)
    assert values["worker_indexed_blocks", ("host", "b")] == 3
    assert values["worker_indexed_bytes", ("b",)] > values["worker_indexed_bytes", ("a",)] == 0
    assert (values["worker_ready", ("a",)], values["worker_ready", ("b",)]) == (1, 0)
    assert values["worker_used_blocks", ("host", "a")] == 6
    assert values["worker_prefill_tokens_per_second", ("a",)] == 1000
    assert values["worker_load_blocks_per_second", ("host", "a")] == 50
    assert ("worker_running_sequences", ("b",)) not in values
    feed = FEED.feed
    assert values["feed_gaps_total", ("a",)] == feed.gaps
    assert values["feed_replays_total", ("a",)] == feed.replays
    assert values["feed_snapshots_total", ("a",)] == feed.snapshots
    assert (values["feed_in_sync", ("a",)], values["feed_silent", ("a",)]) == (1, 0)
    told = {value for (name, _), value in values.items() if name.startswith("feed_")}
    counts = {value for record in (feed, FEED) for value in numbers_of(record)}
    assert counts - told == {FEED.load_messages, feed.malformed, FEED.malformed_messages}
    assert feed.malformed + FEED.malformed_messages in told


def numbers_of(record: Any) -> set[int]:
    return {value for field in fields(record) if isinstance(value := getattr(record, field.name), int)} - {True, False}


def test_every_name_has_the_prefix_and_says_what_it_is(worker: Any, house: Any) -> None:
    families = list(collector(house(worker("a"))).collect())
    assert len({family.name for family in families}) == len(families)
    assert all(family.name.startswith("dynamo_") and family.documentation.endswith(".") for family in families)
