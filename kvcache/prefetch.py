"""A load that nobody computes for yet."""

import logging
from concurrent.futures import Future

from dynamo.kvcache.errors import CacheClosedError
from dynamo.kvcache.sequence import Sequence

__all__ = ["close_when_loaded"]

logger = logging.getLogger(__name__)


def close_when_loaded(sequence: Sequence) -> Future[int]:
    """Takes a sequence over, whose loads have begun, and closes it when they have ended: its blocks stay cached.

    Returns:
        A future of how many of its tokens are in device memory then, or of what went wrong: a CacheClosedError, or
        the device's fault.
    """
    done: Future[int] = Future()

    def finish() -> None:
        failed: Exception | None = None
        num_tokens = 0
        try:
            with sequence:
                sequence.wait(0.0)
                num_tokens = sequence.num_cached_tokens
        except CacheClosedError as error:
            failed = error
        except Exception as error:  # root of a callback: whoever waits for the future must hear of it
            logger.exception("a prefetch of KV blocks failed")
            failed = error
        if done.set_running_or_notify_cancel():
            if failed is None:
                done.set_result(num_tokens)
            else:
                done.set_exception(failed)

    sequence.when_ready(finish)
    return done
