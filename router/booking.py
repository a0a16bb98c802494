"""A routed request's share of its worker's load, until it ends."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

from dynamo.router.roster import Member

__all__ = ["Booking"]


class Booking:
    """Holds a worker's load for one request. Whoever got it from `Router.route` frees it once the request has ended there.

    Also a context manager that frees it. Freeing twice, or after the worker left, does nothing.

    Attributes:
        worker_id: where the request was sent.
        epoch: of that worker's incarnation.
    """

    __slots__ = ("_changed", "_clock", "_found", "_is_free", "_key", "_member", "epoch", "worker_id")

    def __init__(
        self,
        member: Member,
        key: tuple[int, str],
        *,
        clock: Callable[[], float],
        changed: Callable[[Member], None],
        found: Callable[[int], None],
    ) -> None:
        self.worker_id = member.worker_id
        self.epoch = member.load.card.epoch
        self._member = member
        self._key = key
        self._clock = clock
        self._changed = changed
        self._found: Callable[[int], None] | None = found
        self._is_free = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def first_token(self, actual_cached_tokens: int | None = None) -> None:
        """The prompt is computed: it no longer stands before others. Later calls change nothing.

        Args:
            actual_cached_tokens: what the worker says it found of the prompt, to be compared with what was predicted.
        """
        if actual_cached_tokens is not None and self._found is not None:
            self._found(actual_cached_tokens)
            self._found = None
        if not self._is_free and self._member.load.first_token(self._key, self._clock()):
            self._changed(self._member)

    def output_blocks(self, num_blocks: int) -> None:
        """The output fills so many blocks by now. Also a sign of life: call it every now and then."""
        if not self._is_free and self._member.load.output_blocks(self._key, num_blocks, self._clock()):
            self._changed(self._member)

    def free(self) -> None:
        """The request ended at this worker, in whatever way."""
        if self._is_free:
            return
        self._is_free = True
        self._found = None
        if self._member.load.free(self._key, self._clock()):
            self._changed(self._member)
