"""Which of the workers that may take a request gets it."""

import math
import random
from collections.abc import Mapping, Sequence

from dynamo.router.affinity import SessionTable
from dynamo.router.config import RouterConfig
from dynamo.router.cost import CostModel
from dynamo.router.decision import RouteQuery
from dynamo.router.reach import Reach
from dynamo.router.roster import Member

__all__ = ["Choice"]

_TIE = 1e-6  # of the cost: less is rounding
_TIE_S = 1e-6


class Choice:
    """The modes, sessions and ties. Changes nothing but the random numbers it draws."""

    def __init__(self, config: RouterConfig, model: CostModel, sessions: SessionTable) -> None:
        self._config = config
        self._model = model
        self._sessions = sessions

    def choose(
        self,
        query: RouteQuery,
        members: Sequence[Member],
        reaches: Mapping[int, Reach],
        price: tuple[float, float, float],
        now_s: float,
        rng: random.Random,
    ) -> tuple[Member, str]:
        """The worker, and the reason as in `Decision`.

        Args:
            members: at least one; all may take the request.
            reaches: by slot; empty where prefixes do not count.
            price: of computing, as of `RecentWork.price`.
        """
        if len(members) == 1:
            return members[0], "only" if query.pin is None else "pin"
        config = self._config
        bound = self._bound(query, members, now_s)
        if bound is not None and config.affinity == "hard":
            return bound, "session"
        costs: list[float] = []
        if bound is not None or config.mode in ("kv", "least-loaded"):
            costs = self._model.costs(members, reaches, query.num_tokens, price, now_s)
        if bound is not None and costs[members.index(bound)] <= min(costs) + config.session_slack_s:
            return bound, "session"
        if config.mode == "random":
            return rng.choice(members), "random"
        if config.mode == "round-robin":
            return min(members, key=_turn), "turn"
        if config.temperature:
            return members[_draw(costs, config.temperature, rng)], "sampled"
        best_s = min(costs)
        limit_s = best_s + _TIE_S + _TIE * abs(best_s)
        ties = [number for number, cost_s in enumerate(costs) if cost_s <= limit_s]
        if len(ties) == 1:
            return members[ties[0]], "cost"
        return members[rng.choice(ties)], "tie"

    def _bound(self, query: RouteQuery, members: Sequence[Member], now_s: float) -> Member | None:
        if query.session is None or self._config.affinity == "off":
            return None
        worker_id = self._sessions.find(query.session, now_s)
        if worker_id is None:
            return None
        return next((member for member in members if member.worker_id == worker_id), None)


def _turn(member: Member) -> int:
    return member.turn


def _draw(costs: Sequence[float], temperature: float, rng: random.Random) -> int:
    """Softmax over costs that are normalised to their range, so that a temperature means the same at every load."""
    low = min(costs)
    scale = (max(costs) - low) * temperature
    if scale <= 0:
        return rng.randrange(len(costs))
    return rng.choices(range(len(costs)), [math.exp((low - cost_s) / scale) for cost_s in costs])[0]
