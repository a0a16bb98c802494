"""From the tokens of a prompt to who holds how much of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dynamo.kvcache.hashing import chain_root
from dynamo.router.chain import PrefixChain
from dynamo.router.decision import RouteQuery
from dynamo.router.index import PrefixIndex
from dynamo.router.reach import Reach
from dynamo.router.workers import WorkerCard

__all__ = ["NO_LOOKUP", "Group", "Lookup", "PromptLookup", "group_of"]

_MAX_ROOTS = 4096

Group = tuple[str, int]
"""Fingerprint and block size: members of one group give equal blocks equal keys."""


def group_of(card: WorkerCard) -> Group:
    """The worker's group."""
    return card.fingerprint, card.block_size


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the index says of one prompt.

    Attributes:
        chains: of the prompt's keys, by group.
        reaches: by slot; workers that hold nothing of it are absent.
    """

    chains: Mapping[Group, PrefixChain]
    reaches: Mapping[int, Reach]

    @property
    def hash_s(self) -> float:
        """Elapsed time of hashing so far."""
        return sum(chain.hash_s for chain in self.chains.values())


NO_LOOKUP = Lookup({}, {})


class PromptLookup:
    """Asks the index for every group of workers. Not thread-safe: it belongs to its Router.

    A group's roots of chains are remembered by salt and adapter, a bounded number of them.
    """

    def __init__(self, index: PrefixIndex) -> None:
        self._index = index
        self._groups: list[Group] = []
        self._roots: dict[tuple[Group, str, str], int] = {}

    def regroup(self, cards: Iterable[WorkerCard]) -> None:
        """Takes over the groups of those that are members now."""
        self._groups = list(dict.fromkeys(map(group_of, cards)))

    def ask(self, query: RouteQuery, now_s: float) -> Lookup:
        """Who holds how much. Hashes as much of the prompt as that takes, and changes nothing."""
        match self._groups:
            case [group]:  # as a rule
                chain = self._chain(query, group)
                return Lookup({group: chain}, self._index.match(chain, now_s))
        chains = {group: self._chain(query, group) for group in self._groups}
        reaches: dict[int, Reach] = {}
        for chain in chains.values():
            reaches.update(self._index.match(chain, now_s))
        return Lookup(chains, reaches)

    def _chain(self, query: RouteQuery, group: Group) -> PrefixChain:
        key = (group, query.salt, query.lora)
        root = self._roots.get(key)
        if root is None:
            fingerprint, block_size = group
            root = chain_root(bytes.fromhex(fingerprint), block_size, salt=query.salt, lora=query.lora).lo
            if len(self._roots) >= _MAX_ROOTS:
                self._roots.pop(next(iter(self._roots)))
            self._roots[key] = root
        return PrefixChain(root, query.tokens, group[1])
