"""Which earlier use a chain of blocks continues, and when chains come back: what eviction and admission know of the traffic.

The tracker sees every use of every chain, cached or not, and keeps of each a few *marks*: keys at the end of the prompt, at
the end of the answer, and 1, 2, 4, 8 ... blocks before the prompt's end. A later chain that contains a mark continues the use
that left it. A mark of a first turn that several chains went on from lies in a shared prefix, such as a system prompt: a chain
that shares no more than that is the first turn of its own. Marks of later turns are dropped when the chain is continued, so
that a conversation costs about twenty marks however long it gets.
"""

import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import compress, count

from dynamo.kvcache.eviction import Part, Use
from dynamo.kvcache.hazards import HazardEstimator, ReuseTables, group_of

__all__ = ["ReuseTracker", "parts"]

_MIN_SHARERS = 2  # a second continuation of a first turn may be an answer asked for again; it costs little to be wrong
_MIN_REBUILD = 50
_MAX_REBUILD = 2000


def parts(use: Use, num_blocks: int) -> Iterator[tuple[int, int, Use]]:
    """Takes a use of a chain of `num_blocks` apart: (first block, end, use) of each part that is not empty, the last first.

    Pools file each part as an entry of its own, in this order, since one part may come back without the others.
    """
    shared = min(use.num_shared_blocks, num_blocks)
    prompt = num_blocks if use.num_prompt_blocks is None else min(max(use.num_prompt_blocks, shared), num_blocks)
    if num_blocks > prompt:
        yield prompt, num_blocks, _part_of(use, Part.ANSWER)
    known = min(max(use.num_known_blocks, shared), prompt)
    if prompt > known:
        yield known, prompt, use
    if known > shared:
        yield shared, known, _part_of(use, Part.KNOWN)
    if shared:
        yield 0, shared, _part_of(use, Part.SHARED)


def _part_of(use: Use, part: Part) -> Use:
    """`dataclasses.replace` takes five times as long, and this happens several times for each request."""
    return Use(
        use.number,
        use.time_s,
        use.turn,
        use.num_prompt_tokens,
        use.num_output_tokens,
        use.priority,
        use.expires_s,
        use.num_new_tokens,
        part,
        use.num_shared_blocks,
        use.num_sharers,
        use.num_known_blocks,
        use.num_prompt_blocks,
    )


class _Past:
    """What is remembered of a use. The items are those of HazardEstimator, one for each part that waits for its reuse."""

    __slots__ = ("before", "num_tokens", "waits")

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens  # of the prompt
        self.waits: list[tuple[int, int]] = []  # (blocks of the chain that have to come back, item)
        self.before: list[int] = []  # groups whose wait this use ended; until its own group is known


class _Mark:
    """A key that was seen: who passed it last, and how many chains went on from it that share no later mark."""

    __slots__ = ("branches", "past", "shared_item", "turn")

    def __init__(self, past: _Past, turn: int) -> None:
        self.past = past
        self.turn = turn  # of the first use that passed it
        self.branches = 0
        self.shared_item: int | None = None

    @property
    def is_shared(self) -> bool:
        return self.turn == 0 and self.branches >= _MIN_SHARERS


class ReuseTracker:
    """Turns chains into `Use`s and learns the hazards of reuse. Thread-safe. Memory is bounded by its two limits."""

    def __init__(self, *, max_marks: int = 131072, max_waiting: int = 32768) -> None:
        """
        Args:
            max_marks: keys remembered, about 300 bytes each. Those that no chain passed for longest are forgotten first.
            max_waiting: parts of uses whose reuse is waited for, 16 bytes each.
        """
        self._lock = threading.Lock()
        self._max_marks = max_marks
        self._marks: dict[Hashable, _Mark] = {}  # longest not passed first
        self._open: dict[int, _Past] = {}  # by number of the use, until `finish`
        self._estimator = HazardEstimator(max_waiting)
        self._num_uses = 0
        self._learned_uses = 0
        self._tables = self._estimator.tables(0.0)

    @property
    def num_marks(self) -> int:
        """Keys remembered now."""
        return len(self._marks)

    @property
    def tables(self) -> ReuseTables:
        """What was learned; a new object whenever it was learned anew."""
        return self._tables

    def observe(
        self,
        keys: Sequence[Hashable],
        now_s: float,
        *,
        num_prompt_tokens: int,
        priority: int = 0,
        expires_s: float | None = None,
    ) -> Use:
        """A request begins to use a chain.

        Args:
            keys: of the prompt's full blocks, from the first on.
            now_s: on a clock that does not go back, the same for all calls.

        Returns:
            The use, as far as it is known before the answer.
        """
        with self._lock:
            marks, estimator = self._marks, self._estimator
            passed: list[int] = []
            if not marks.keys().isdisjoint(keys):  # a chain that nobody has seen is told apart at half the cost
                passed = list(compress(count(), map(marks.__contains__, keys)))
            deepest = marks[keys[passed[-1]]] if passed else None
            past, turn = None, 0
            if deepest is not None:
                if not deepest.is_shared:
                    past, turn = deepest.past, deepest.turn + 1
                deepest.branches += 1
            known = passed[-1] + 1 if past is not None else 0
            num_shared, waited = self._pass_shared(keys, passed, now_s)
            self._num_uses += 1
            use = Use(
                self._num_uses,
                now_s,
                turn,
                num_prompt_tokens,
                priority=priority,
                expires_s=expires_s,
                num_new_tokens=max(0, num_prompt_tokens - (0 if past is None else past.num_tokens)),
                num_shared_blocks=num_shared,
                num_sharers=marks[keys[num_shared - 1]].branches if num_shared else 0,
                num_known_blocks=known,
                num_prompt_blocks=len(keys),
            )
            current = _Past(num_prompt_tokens)
            if past is not None:
                self._end_waits(past, known, current, now_s)
            for start, end, part in parts(use, len(keys)):
                item = estimator.begin(group_of(part), now_s)
                if part.part is Part.SHARED:
                    marks[keys[end - 1]].shared_item = item
                    for group in waited:
                        estimator.followed(group, group_of(part))
                else:  # a part has come back if more than half of it has
                    current.waits.append(((start + end) // 2 + 1, item))
            self._mark(keys, passed, current, turn)
            self._open[use.number] = current
            if len(self._open) > self._max_marks:  # uses that never end: somebody does not call `finish`
                self._open.pop(next(iter(self._open)))
            return use

    def finish(self, use: Use, keys: Sequence[Hashable], num_output_tokens: int) -> Use:
        """A request ended.

        Args:
            use: what `observe` returned.
            keys: of all full blocks of prompt and answer.

        Returns:
            The use with all that is known of it, to file its blocks with.
        """
        if num_output_tokens != use.num_output_tokens:
            use = replace(use, num_output_tokens=num_output_tokens)
        with self._lock:
            current = self._open.pop(use.number, None)
            if current is not None:
                self._end(current, use, keys)
            self._learn(use.time_s)
        return use

    def _end_waits(self, past: _Past, known: int, current: _Past, now_s: float) -> None:
        for needed, item in past.waits:
            if needed <= known:
                group = self._estimator.reused(item, now_s)
                if group is not None:
                    current.before.append(group)

    def _end(self, current: _Past, use: Use, keys: Sequence[Hashable]) -> None:
        """The length of the answer is known, and so the groups."""
        waits = list(current.waits)
        known_group = group_of(_part_of(use, Part.KNOWN))
        for group in current.before:
            self._estimator.followed(group, known_group)
        for start, end, part in parts(use, len(keys)):
            if part.part is Part.ANSWER:
                item = self._estimator.begin(group_of(part), use.time_s)
                current.waits.append(((start + end) // 2 + 1, item))
                self._set_mark(keys[-1], current, use.turn)
            elif part.part is not Part.SHARED and waits:
                self._estimator.regroup(waits.pop(0)[1], group_of(part))

    def _pass_shared(self, keys: Sequence[Hashable], passed: list[int], now_s: float) -> tuple[int, list[int]]:
        """Ends the waits of all shared prefixes of a chain.

        Returns:
            Blocks of the longest of them, and the groups that waited.
        """
        num_shared = 0
        waited: list[int] = []
        for i in passed:
            mark = self._marks[keys[i]]
            if mark.is_shared:
                num_shared = i + 1
                if mark.shared_item is not None:
                    group = self._estimator.reused(mark.shared_item, now_s)
                    mark.shared_item = None
                    if group is not None:
                        waited.append(group)
        return num_shared, waited

    def _mark(self, keys: Sequence[Hashable], passed: list[int], current: _Past, turn: int) -> None:
        """Leaves the marks of a use, and takes away those that they replace."""
        marks = self._marks
        own = {len(keys) - 1} if keys else set()
        distance = 1
        while distance < len(keys):
            own.add(len(keys) - 1 - distance)
            distance *= 2
        for i in passed:
            mark = marks.pop(keys[i])
            if mark.turn == 0 or i in own:
                mark.past = current
                marks[keys[i]] = mark  # now the one passed last
        covering = turn  # turn of the first use that passed what lies before the mark last looked at
        turns = [(i, marks[keys[i]].turn) for i in passed if keys[i] in marks]
        for i in sorted(own.difference(passed), reverse=True):
            while turns and turns[-1][0] > i:
                covering = turns.pop()[1]
            self._set_mark(keys[i], current, covering)

    def _set_mark(self, key: Hashable, current: _Past, turn: int) -> None:
        mark = self._marks.pop(key, None)
        if mark is None:
            mark = _Mark(current, turn)
        mark.past = current
        self._marks[key] = mark
        if len(self._marks) > self._max_marks:
            del self._marks[next(iter(self._marks))]

    def _learn(self, now_s: float) -> None:
        """Learns anew after 50 uses, then after every 2.5 % more: the more is known, the less changes."""
        new = self._num_uses - self._learned_uses
        if new >= min(_MAX_REBUILD, max(_MIN_REBUILD, self._num_uses // 40)):
            self._estimator.fade(new)
            self._tables = self._estimator.tables(now_s)
            self._learned_uses = self._num_uses
