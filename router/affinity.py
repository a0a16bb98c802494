"""Which worker a conversation belongs to."""

from collections import OrderedDict

__all__ = ["SessionTable"]


class SessionTable:
    """Workers by session id, each remembered for a time after its last request. Not thread-safe: it belongs to its Router.

    Bounded: when it is full, the session longest unused is forgotten.
    """

    def __init__(self, ttl_s: float, max_sessions: int) -> None:
        self._ttl_s = ttl_s
        self._max_sessions = max_sessions
        self._bound: OrderedDict[str, tuple[str, float]] = OrderedDict()  # worker and expiry; soonest to expire first

    def __len__(self) -> int:
        return len(self._bound)

    def find(self, session: str, now_s: float) -> str | None:
        """The session's worker, if it has one. Changes nothing."""
        worker_id, expires_s = self._bound.get(session, ("", now_s))
        return worker_id if now_s < expires_s else None

    def bind(self, session: str, worker_id: str, now_s: float) -> None:
        """The session had a request at this worker."""
        self._bound[session] = (worker_id, now_s + self._ttl_s)
        self._bound.move_to_end(session)
        if len(self._bound) > self._max_sessions:
            self._bound.popitem(last=False)

    def expire(self, now_s: float) -> int:
        """Forgets sessions that were not used for too long; returns how many."""
        num_expired = 0
        while self._bound and next(iter(self._bound.values()))[1] <= now_s:
            self._bound.popitem(last=False)
            num_expired += 1
        return num_expired
