"""A load that nobody computes for yet."""

from concurrent.futures import Future

from dynamo.kvcache.errors import CacheClosedError
from dynamo.kvcache.sequence import Sequence

__all__ = ["close_when_loaded"]


def close_when_loaded(sequence: Sequence) -> Future[int]:
    """Takes a sequence over, whose loads have begun, and closes it when they have ended: its blocks stay cached.

    Returns:
        A future of how many of its tokens are in device memory then, or of a CacheClosedError.
    """
    done: Future[int] = Future()

    def finish() -> None:
        closed: CacheClosedError | None = None
        num_tokens = 0
        try:
            with sequence:
                sequence.wait(0.0)
                num_tokens = sequence.num_cached_tokens
        except CacheClosedError as error:
            closed = error
        if done.set_running_or_notify_cancel():
            if closed is None:
                done.set_result(num_tokens)
            else:
                done.set_exception(closed)

    sequence.when_ready(finish)
    return done
