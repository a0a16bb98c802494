"""How far into a prompt a worker's tiers reach."""

from dataclasses import dataclass

__all__ = ["TIERS", "Reach"]

TIERS = ("device", "host", "disk", "remote")
"""Fastest first."""


@dataclass(frozen=True, slots=True)
class Reach:
    """Leading blocks of a prompt that a worker holds without a gap, cumulative over its tiers.

    So `device <= host <= disk <= remote`, and `remote` counts what it need not compute.

    Attributes:
        device: in device memory alone, or expected there because of a request that was routed to it.
        host: in device or host memory.
        disk: in either, or on disk.
        remote: in any tier.
    """

    device: int
    host: int
    disk: int
    remote: int
