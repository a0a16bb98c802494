"""Finds stop strings in text that arrives in pieces (Aho and Corasick, 1975, https://doi.org/10.1145/360825.360855)."""

from collections import deque

__all__ = ["StopMatcher"]


class StopMatcher:
    """An automaton over characters; the result does not depend on how the text is cut into pieces.

    The match that ends first wins, and of those the longest. Empty strings are ignored.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        # Nodes are prefixes of stop strings; node 0 is the empty one.
        self._next: list[dict[str, int]] = [{}]
        self._match: list[str | None] = [None]
        for stop in filter(None, stops):
            node = 0
            for char in stop:
                node = self._next[node].setdefault(char, len(self._next))
                if node == len(self._next):
                    self._next.append({})
                    self._match.append(None)
            self._match[node] = stop
        self._depth, self._fail = [0] * len(self._next), [0] * len(self._next)
        self._link()
        self._node = 0

    @property
    def num_held(self) -> int:
        """Length of the longest end of the text so far that is a beginning of a stop string."""
        return self._depth[self._node]

    def feed(self, text: str, *, ignore: bool = False) -> tuple[int, str] | None:
        """Takes the next piece of text.

        Args:
            ignore: let matches pass.

        Returns:
            Where in `text` (exclusive) the first match ends, and the stop string; None if there is none. After a
            match the rest of the text has not been looked at.
        """
        node = self._node
        for i, char in enumerate(text):
            while node and char not in self._next[node]:
                node = self._fail[node]
            node = self._next[node].get(char, 0)
            stop = self._match[node]
            if stop is not None and not ignore:
                self._node = node
                return i + 1, stop
        self._node = node
        return None

    def _link(self) -> None:
        """Breadth first: each node's depth, its longest proper suffix that is a node, and the match it inherits."""
        queue = deque([0])
        while queue:
            node = queue.popleft()
            for char, child in self._next[node].items():
                queue.append(child)
                self._depth[child] = self._depth[node] + 1
                if node:
                    fail = self._fail[node]
                    while fail and char not in self._next[fail]:
                        fail = self._fail[fail]
                    self._fail[child] = self._next[fail].get(char, 0)
                self._match[child] = self._match[child] or self._match[self._fail[child]]
