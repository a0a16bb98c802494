"""The workers' own metrics through their front: one page for all of them, each sample with its worker's name.

Workers answer on private sockets that no scraper reaches, so the front asks them. What they say is not put among the front's
own families: there the engine's are the sums, and `sum()` over both would count everything twice.
"""

from collections.abc import Mapping
from typing import Final

__all__ = ["METRICS_OF_WORKERS_PATH", "merge_metrics"]

METRICS_OF_WORKERS_PATH: Final = "/metrics/workers"

_UP: Final = "dynamo_worker_scraped"


def merge_metrics(pages: Mapping[str, bytes | None]) -> bytes:
    """One page of several, in Prometheus' text format as workers write it: families together, a label `worker` first.

    Args:
        pages: by worker id, which has no character that a label would have to escape; None for a worker that could not be
            asked. It is left out, but for `dynamo_worker_scraped`, which says so.
    """
    families: dict[str, list[str]] = {}  # its HELP and TYPE lines, as the first one said them, and all samples
    for worker_id, page in sorted(pages.items()):
        if page is not None:
            _add(families, page.decode("utf-8", "replace"), f'worker="{worker_id}"')
    lines = [f"# HELP {_UP} 1: the worker's metrics are on this page.", f"# TYPE {_UP} gauge"]
    lines += (f'{_UP}{{worker="{worker_id}"}} {int(page is not None)}' for worker_id, page in sorted(pages.items()))
    return "\n".join([*lines, *(line for family in families.values() for line in family), ""]).encode()


def _add(families: dict[str, list[str]], page: str, label: str) -> None:
    family: list[str] = []
    is_new = False
    for line in page.split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            is_new = name not in families
            family = families.setdefault(name, [])
        if line.startswith("#"):
            if is_new:
                family.append(line)
        elif line:
            family.append(_labelled(line, label))


def _labelled(sample: str, label: str) -> str:
    """`name{a="b"} 1` or `name 1`, with another label before the others."""
    end = sample.find(" ")
    brace = sample.find("{", 0, end)
    if brace < 0:
        return f"{sample[:end]}{{{label}}}{sample[end:]}"
    return f"{sample[: brace + 1]}{label},{sample[brace + 1 :]}"
