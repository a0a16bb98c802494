"""What computing costs at each worker, by how much of it the worker was given lately.

Load that is under way does not tell workers apart while there is little of it: whoever once held the common system prompt would
get every request, fill its cache and evict what it is asked for next, while the others idle. So computing has a price: the
worker that was given its fair share lately asks 1 for each second, those with less ask less, those with more ask more. A prefix
that is most of the prompt is worth going to anywhere; one that is a small part of it is not worth going to a worker that
already gets most of the work.
"""

import math

from dynamo.router.roster import Member

__all__ = ["RecentWork"]

_MEMORY_S = 120.0
_LITTLE_S = 0.25  # each worker counts as having been given that much: of nothing, nobody has more than a share
_MOST_SHARES = 3.0  # fair shares beyond which the price does not rise
_RESCALE_EXPONENT = 50.0


class RecentWork:
    """Seconds of computing that were booked at each worker, fading over two minutes. Not thread-safe: it belongs to its Router.

    New work is weighted up instead of old work being weighted down, so that only who is given work changes:
    G. Cormode et al., "Forward Decay", https://doi.org/10.1109/ICDE.2009.65.
    """

    def __init__(self, weight: float, now_s: float) -> None:
        """
        Args:
            weight: how much the price rises with each fair share; 0: it is 1 everywhere.
        """
        self._weight = weight
        self._total = 0.0
        self._start_s = now_s

    def add(self, member: Member, seconds: float, now_s: float) -> None:
        """So much computing was booked at a member."""
        weighted = seconds * self._scale(now_s)
        member.recent += weighted
        self._total += weighted

    def forget(self, member: Member) -> None:
        """The member left."""
        self._total -= member.recent

    def rescale(self, members: list[Member], now_s: float) -> None:
        """Keeps numbers small: to be called every now and then, well within an hour."""
        exponent = (now_s - self._start_s) / _MEMORY_S
        if exponent < _RESCALE_EXPONENT:
            return
        share = math.exp(-exponent)
        for member in members:
            member.recent *= share
        self._total = sum(member.recent for member in members)
        self._start_s = now_s

    def price(self, num_members: int, now_s: float) -> tuple[float, float, float]:
        """(a, b, most): computing costs `min(a + b * member.recent, most)` for each second."""
        weight = self._weight
        if not weight or not num_members:
            return 1.0, 0.0, 1.0
        little = _LITTLE_S * self._scale(now_s)
        share = weight / (max(0.0, self._total) / num_members + little)
        return 1.0 - weight + share * little, share, 1.0 + weight * (_MOST_SHARES - 1.0)

    def _scale(self, now_s: float) -> float:
        return math.exp(min((now_s - self._start_s) / _MEMORY_S, 10 * _RESCALE_EXPONENT))  # floats end at 709
