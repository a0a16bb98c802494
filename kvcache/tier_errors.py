"""What tiers raise, in the words of this package."""

from collections.abc import Iterator
from contextlib import contextmanager

from dynamo.kvcache.errors import CacheClosedError, CacheConfigError, CacheMemoryError
from dynamo.tiers.errors import TierClosedError, TierConfigError, TierMemoryError

__all__ = ["translated_errors"]


@contextmanager
def translated_errors(tier: str) -> Iterator[None]:
    """Within it, errors of tiers become the cache's own; memory that is lacking is lacking for `tier`."""
    try:
        yield
    except TierMemoryError as error:
        raise CacheMemoryError(
            str(error), tier=tier, needed_bytes=error.needed_bytes, available_bytes=error.available_bytes
        ) from error
    except TierConfigError as error:
        raise CacheConfigError(str(error)) from error
    except TierClosedError as error:
        raise CacheClosedError(str(error)) from error
