from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from dynamo.serve.worker_metrics import merge_metrics


def page(count: int, *, tiers: tuple[str, ...] = ("host",)) -> bytes:
    registry = CollectorRegistry()
    plain = Counter("dynamo_steps", "Steps {of} the engine.", registry=registry)
    labelled = Counter("dynamo_blocks", "Blocks.", ["tier"], registry=registry)
    times = Histogram("dynamo_time_seconds", "Time.", ["kind"], registry=registry, buckets=(0.1, 1.0))
    plain.inc(count)
    for tier in tiers:
        labelled.labels(tier).inc(count)
    times.labels('a "quoted", {braced} one').observe(0.5)
    return generate_latest(registry)


def test_every_sample_is_there_with_its_workers_name() -> None:
    pages = {"worker-1": page(2, tiers=("host", "disk")), "worker-0": page(1)}
    families = list(text_string_to_metric_families(merge_metrics(pages).decode()))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation.endswith(".") for family in families)
    merged = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value for f in families for sample in f.samples
    }
    for worker_id, alone in pages.items():
        for family in text_string_to_metric_families(alone.decode()):
            for sample in family.samples:
                labels = tuple(sorted({**sample.labels, "worker": worker_id}.items()))
                assert merged.pop((sample.name, labels)) == sample.value
    assert {name for name, _ in merged} == {"dynamo_worker_scraped"}


def test_a_worker_that_could_not_be_asked_is_left_out_and_said_to_be() -> None:
    text = merge_metrics({"there": page(1), "gone": None}).decode()
    assert 'dynamo_worker_scraped{worker="gone"} 0' in text
    assert 'dynamo_worker_scraped{worker="there"} 1' in text
    assert text.count("gone") == 1
    assert merge_metrics({}).decode().count("\n") == 2
