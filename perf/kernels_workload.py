"""What a section of the kernel benchmark is given and what it gives back. Loads no torch, so that processes start at once."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from dynamo.perf.report import Result

__all__ = ["Findings", "Workload"]

Findings = Iterator[Result | str]
"""What a section yields as soon as it knows it: numbers, and notes for the reader, such as what was skipped and why."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What one section is asked to do.

    Attributes:
        mib: bytes each copy moves, in MiB; smaller where a case has a size of its own.
        repeats: runs of each case; medians count.
        device: torch device the tensors live on; "cpu" in the sections of that name.
    """

    mib: int
    repeats: int
    device: str

    @property
    def num_bytes(self) -> int:
        return self.mib << 20

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))
