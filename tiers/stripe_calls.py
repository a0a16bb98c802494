"""One read or write of a stripe, from its start to its outcomes; the file stays open and the generations are compared."""

import contextlib
from types import TracebackType
from typing import Self

import numpy as np

from dynamo.kernels.checks import SlotIds
from dynamo.tiers.slot_io import PendingIO
from dynamo.tiers.stripe import ABSENT, Generations, IOTarget, Stripe
from dynamo.tiers.tier import Outcomes

__all__ = ["StripeRead", "StripeWrite"]


class _FileUse:
    """A context in which a stripe's file stays open."""

    def __init__(self, stripe: Stripe) -> None:
        self._stripe = stripe
        self.file = stripe.acquire_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.file is not None:
            self._stripe.release_file(self.file)


class StripeRead:
    """A read, under way, of those of some slots that hold something, and of the generations expected if given."""

    def __init__(
        self, stripe: Stripe, slots: SlotIds, target: IOTarget, row_ids: SlotIds, expected: Generations | None
    ) -> None:
        self._stripe = stripe
        self._slots = slots
        self._pending: PendingIO | None = None
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(_FileUse(stripe)).file
            self._before = stripe.generations(slots)
            self._wanted = self._before != ABSENT
            if expected is not None:
                self._wanted &= self._before == expected
            if file is None:
                self._wanted[:] = False
                stripe.report("unavailable", slots.size)
            elif self._wanted.all():
                self._pending = stripe.begin(file, slots, target, row_ids, writes=False)
            elif self._wanted.any():
                self._pending = stripe.begin(file, slots[self._wanted], target, row_ids[self._wanted], writes=False)
            self._use = stack.pop_all()

    def finish(self) -> Outcomes:
        """Waits; bool [n], True where the slot held the same content from start to end and all of it was read."""
        with self._use:
            outcomes = np.zeros(self._slots.size, dtype=np.bool_)
            if self._pending is not None:
                outcomes[self._wanted] = self._stripe.finish(self._pending, writes=False)
                is_changed = outcomes & (self._stripe.generations(self._slots) != self._before)
                if is_changed.any():
                    outcomes &= ~is_changed
                    self._stripe.report("overwritten", int(np.count_nonzero(is_changed)))
        return outcomes


class StripeWrite:
    """A write to some slots of a stripe, under way. Makes room in the file first, which may block."""

    def __init__(self, stripe: Stripe, slots: SlotIds, target: IOTarget, row_ids: SlotIds) -> None:
        self._stripe = stripe
        self._slots = slots
        self._pending: PendingIO | None = None
        self._wanted = np.zeros(slots.size, dtype=np.bool_)
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context(_FileUse(stripe)).file
            if self._file is None:
                stripe.report("unavailable", slots.size)
            else:
                if slots.size:
                    self._wanted = stripe.make_room(self._file, slots)
                if self._wanted.any():
                    written = slots[self._wanted]
                    stripe.mark_absent(written)
                    self._pending = stripe.begin(self._file, written, target, row_ids[self._wanted], writes=True)
            self._use = stack.pop_all()

    def finish(self) -> Outcomes:
        """Waits; bool [n], True where the slot holds the row's bytes."""
        with self._use:
            outcomes = np.zeros(self._slots.size, dtype=np.bool_)
            if self._pending is not None and self._file is not None:
                outcomes[self._wanted] = self._stripe.finish(self._pending, writes=True)
                if not self._stripe.mark_present(self._file, self._slots[outcomes]):
                    outcomes[:] = False
        return outcomes
