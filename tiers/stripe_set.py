"""The directories of a disk tier together: which slot lies where, and what an earlier run left in them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dynamo.kernels.checks import SlotIds
from dynamo.tiers.errors import JournalFormatError, TierUnavailableError
from dynamo.tiers.identity import StripeIdentity, judge_stripes, read_identity, write_identity
from dynamo.tiers.journal import Journal
from dynamo.tiers.layout import BlockLayout
from dynamo.tiers.namespace import Namespace
from dynamo.tiers.recovered import RecoveredBlocks
from dynamo.tiers.slot_io import SlotIO
from dynamo.tiers.stripe import ABSENT, FaultReport, Generations, IOTarget, Stripe
from dynamo.tiers.stripe_calls import StripeRead, StripeWrite
from dynamo.tiers.tier import Outcomes

__all__ = ["StripePlan", "StripeSet", "index_fingerprint"]

_CLOSE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class StripePlan:
    """What a set of stripes is made of.

    Attributes:
        directories: one or several, in their order.
        fingerprint: names model, dtype and layout.
        layout: sizes of a block.
        stripe_slots: slots of each directory.
        stripe_capacity_bytes: what all models in each directory may take together.
        new_io: makes the I/O back-end of a directory.
        report: told of every fault.
    """

    directories: Sequence[Path]
    fingerprint: bytes
    layout: BlockLayout
    stripe_slots: int
    stripe_capacity_bytes: int
    new_io: Callable[[], SlotIO]
    report: FaultReport


class StripeSet:
    """Slot `s` lies in stripe `s % n` at place `s // n`. Owns the stripes and the journal; thread-safe."""

    def __init__(self, stripes: Sequence[Stripe], journal: Journal, recovered: RecoveredBlocks) -> None:
        """Takes over what it is given; use `open`."""
        self.stripes = tuple(stripes)
        self.journal = journal
        self.recovered = recovered

    @classmethod
    def open(cls, plan: StripePlan) -> "StripeSet":
        """Locks, judges and opens all directories; what is lost is reported and forgotten.

        Raises:
            TierBusyError: another process uses a folder.
            TierUnavailableError: a folder is foreign, another version's, or belongs elsewhere.
            OSError: a folder or file cannot be used.
        """
        with contextlib.ExitStack() as undo:
            namespaces = [
                undo.enter_context(contextlib.closing(Namespace(directory, plan.fingerprint)))
                for directory in plan.directories
            ]
            states = [read_identity(namespace.identity_path) for namespace in namespaces]
            identities = StripeIdentity.new_set(plan.fingerprint, plan.layout, len(namespaces))
            is_lost = judge_stripes([namespace.folder for namespace in namespaces], states, identities)
            if is_lost is None:
                for namespace, identity in reversed(list(zip(namespaces, identities, strict=True))):
                    write_identity(namespace.identity_path, identity)  # the first one last: then the set is complete
                if any(state.is_present for state in states):
                    plan.report("restriped" if states[0].identity else "missing", 1, "")
            elif states[0].identity is not None:
                identities = [replace(wanted, set_id=states[0].identity.set_id) for wanted in identities]
            journal = _open_journal(namespaces[0], plan, is_new=is_lost is None)
            undo.callback(journal.close)
            for number in np.flatnonzero(is_lost or []).tolist():
                plan.report("missing", 1, "")
                journal.forget(np.arange(number, journal.num_slots, len(namespaces)))
                write_identity(namespaces[number].identity_path, identities[number])
            stripes = []
            for number, (namespace, identity) in enumerate(zip(namespaces, identities, strict=True)):
                io = plan.new_io()
                undo.callback(io.close)
                stripes.append(
                    Stripe(
                        namespace,
                        identity,
                        io,
                        plan.stripe_slots,
                        plan.stripe_capacity_bytes,
                        plan.report,
                        _forgetting(journal, number, len(namespaces)),
                    )
                )
                undo.callback(stripes[-1].close, 0.0)
            recovered = _recover(stripes, journal, is_lost or [], plan.report)
            journal.release_recovered()
            undo.pop_all()
        return cls(stripes, journal, recovered)

    def read(self, slots: SlotIds, target: IOTarget, row_ids: SlotIds, expected: Generations | None) -> Outcomes:
        """Reads slots, all stripes at the same time; bool [n]."""

        def start(stripe: Stripe, where: SlotIds | slice, places: SlotIds) -> StripeRead:
            return StripeRead(stripe, places, target, row_ids[where], None if expected is None else expected[where])

        return self._run(slots, start)

    def write(self, slots: SlotIds, target: IOTarget, row_ids: SlotIds) -> Outcomes:
        """Writes rows to slots, all stripes at the same time; bool [n]."""

        def start(stripe: Stripe, where: SlotIds | slice, places: SlotIds) -> StripeWrite:
            return StripeWrite(stripe, places, target, row_ids[where])

        return self._run(slots, start)

    def generations(self, slots: SlotIds) -> Generations:
        """Of each slot, uint64 [n]."""
        generations = np.full(slots.size, ABSENT, dtype=np.uint64)
        for where, stripe, local in self._parts(slots):
            generations[where] = stripe.generations(local)
        return generations

    def release_recovered(self) -> None:
        """Frees the memory of `recovered`, which is empty from now on."""
        self.recovered = RecoveredBlocks.empty()

    @property
    def num_whole_slots(self) -> int:
        """So many slots, from the first on, lie within their files."""
        return min(stripe.num_whole_slots * len(self.stripes) + i for i, stripe in enumerate(self.stripes))

    @property
    def num_losses(self) -> int:
        """How often everything was lost: with one stripe only; with more, the others still hold theirs."""
        return self.stripes[0].num_losses if len(self.stripes) == 1 else 0

    @property
    def path(self) -> str:
        """The worst that any stripe does: "unavailable", "buffered" or "O_DIRECT"."""
        paths = {stripe.path for stripe in self.stripes}
        return next(path for path in ("unavailable", "buffered", "O_DIRECT") if path in paths)

    def resize(self, num_slots: int) -> None:
        """Changes the number of slots of all stripes; see `Stripe.resize`."""
        self.journal.resize(num_slots)
        count = len(self.stripes)
        for i, stripe in enumerate(self.stripes):
            stripe.resize(-(-(num_slots - i) // count))

    def close(self) -> None:
        """Waits up to 30 s for calls in progress, closes stripes and journal, and gives the locks back. Idempotent."""
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        for stripe in self.stripes:
            stripe.close(max(0.0, deadline - time.monotonic()))
        self.journal.close()
        for stripe in self.stripes:
            stripe.namespace.close()

    def _run(
        self, slots: SlotIds, start: Callable[[Stripe, SlotIds | slice, SlotIds], StripeRead | StripeWrite]
    ) -> Outcomes:
        outcomes = np.zeros(slots.size, dtype=np.bool_)
        with (
            contextlib.ExitStack() as finishing
        ):  # also when a stripe was closed meanwhile: others use the rows already

            def finish(where: SlotIds | slice, part: StripeRead | StripeWrite) -> None:
                outcomes[where] = part.finish()

            for where, stripe, places in self._parts(slots):
                finishing.callback(finish, where, start(stripe, where, places))
        return outcomes

    def _parts(self, slots: SlotIds) -> Iterator[tuple[SlotIds | slice, Stripe, SlotIds]]:
        """(positions in `slots`, stripe, slots within the stripe) of every stripe that has any of them."""
        count = len(self.stripes)
        if count == 1:
            yield slice(None), self.stripes[0], slots
            return
        places, numbers = np.divmod(slots, count)
        for number, stripe in enumerate(self.stripes):
            where = np.flatnonzero(numbers == number)
            if where.size:
                yield where, stripe, places[where]


def index_fingerprint(fingerprint: bytes, slot_bytes: int, num_stripes: int) -> bytes:
    """What the index of a tier belongs to: a slot means the same place only for the same width and number of stripes."""
    return fingerprint + slot_bytes.to_bytes(8, "little") + num_stripes.to_bytes(8, "little")


def _open_journal(namespace: Namespace, plan: StripePlan, *, is_new: bool) -> Journal:
    """The index, or a new one where the old one is of no use, which is reported."""
    count = len(plan.directories)
    num_slots = plan.stripe_slots * count
    fingerprint = index_fingerprint(plan.fingerprint, plan.layout.slot_bytes, count)
    if is_new:
        return Journal.create(namespace.journal_path, num_slots, fingerprint)
    try:
        journal = Journal.open(namespace.journal_path, num_slots, fingerprint)
    except JournalFormatError as error:
        if error.is_other_version:
            raise TierUnavailableError(
                f"{error}; delete the folder or give the disk tier another directory", path=error.path
            ) from error
        plan.report("index_format", 1, str(error))
        return Journal.create(namespace.journal_path, num_slots, fingerprint)
    plan.report("index_damaged", journal.num_damaged, "")
    return journal


def _forgetting(journal: Journal, number: int, count: int) -> Callable[[], None]:
    """What to do when everything in a stripe was lost while running."""

    def forget() -> None:
        if count == 1:
            journal.clear()
        else:
            journal.forget(np.arange(number, journal.num_slots, count))

    return forget


def _recover(
    stripes: Sequence[Stripe], journal: Journal, is_lost: Sequence[bool], report: FaultReport
) -> RecoveredBlocks:
    """Compares what the index says with what the files hold."""
    found = journal.recovered
    places, numbers = np.divmod(found.slots, len(stripes))
    is_whole = np.ones(len(found), dtype=np.bool_)
    for number, stripe in enumerate(stripes):
        is_here = numbers == number
        if any(is_lost[number : number + 1]):  # reported and forgotten already
            is_whole &= ~is_here
        elif stripe.is_new and is_here.any():
            report("missing", 1, "")
            is_whole &= ~is_here
        else:
            is_cut = is_here & (places >= stripe.num_whole_slots)
            report("truncated", int(np.count_nonzero(is_cut)), "")
            is_whole &= ~is_cut
    if not is_whole.all():
        journal.forget(found.slots[~is_whole])
    for number, stripe in enumerate(stripes):
        stripe.recover(places[is_whole & (numbers == number)])
    return found.selected(is_whole)
