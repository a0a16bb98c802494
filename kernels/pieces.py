"""Plain copies as a table: where from, where to, how many bytes."""

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from dynamo.kernels.checks import KernelArgumentError

__all__ = ["Pieces"]

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """Plain copies as one table: row 0 source addresses, row 1 destination addresses, row 2 sizes in bytes.

    >>> import numpy as np
    >>> from dynamo.kernels.pieces import Pieces
    >>> pieces = Pieces.of(src=[0, 64, 256], dst=[1000, 1064, 1128], sizes=[64, 64, 64])
    >>> pieces.merged().sizes.tolist()
    [128, 64]
    >>> pieces.split_at(np.array([32]), "src").src.tolist()
    [0, 32, 64, 256]

    Attributes:
        table: int64 [3, num_pieces], C-contiguous.
        storages: int64, ascending, where each allocation begins that pieces lie in: the engine takes no copy across two,
            so that nothing may be joined there even where they touch.
    """

    table: Int64s
    storages: Int64s = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    @classmethod
    def of(cls, src: npt.ArrayLike, dst: npt.ArrayLike, sizes: npt.ArrayLike) -> "Pieces":
        """Pieces from three equally long 1-D lists of integers.

        Raises:
            KernelArgumentError: lengths differ, a size is not positive, or an address is negative.
        """
        columns = [np.asarray(column, dtype=np.int64) for column in (src, dst, sizes)]
        shapes = {column.shape for column in columns}
        if len(shapes) != 1 or columns[0].ndim != 1:
            raise KernelArgumentError(f"src, dst and sizes must be 1-D and equally long, got shapes {sorted(shapes)}")
        pieces = cls(np.stack(columns))
        pieces.check()
        return pieces

    @property
    def src(self) -> Int64s:
        """Source addresses, int64 [num_pieces]."""
        column: Int64s = self.table[0]
        return column

    @property
    def dst(self) -> Int64s:
        """Destination addresses, int64 [num_pieces]."""
        column: Int64s = self.table[1]
        return column

    @property
    def sizes(self) -> Int64s:
        """Bytes of each piece, int64 [num_pieces]."""
        column: Int64s = self.table[2]
        return column

    @property
    def num_pieces(self) -> int:
        """How many copies these are."""
        return int(self.table.shape[1])

    @property
    def num_bytes(self) -> int:
        """Sum of the sizes."""
        return int(self.sizes.sum())

    def check(self) -> None:
        """Raises KernelArgumentError unless this is int64 [3, n], C-contiguous, with positive sizes and no negative address."""
        table = self.table
        if table.dtype != np.int64 or table.ndim != 2 or table.shape[0] != 3 or not table.flags.c_contiguous:
            raise KernelArgumentError(f"pieces must be C-contiguous int64 [3, n], got {table.dtype} {table.shape}")
        if table.shape[1] == 0:
            return
        if int(self.sizes.min()) <= 0:
            raise KernelArgumentError(f"piece {int(self.sizes.argmin())} has {int(self.sizes.min())} bytes; drop it")
        if int(table[:2].min()) < 0:
            raise KernelArgumentError(f"address {int(table[:2].min())} is negative")

    def merged(self, min_joins: int = 1) -> "Pieces":
        """The same copies with neighbours joined that are contiguous on both sides; itself with fewer than `min_joins`.

        Where a storage begins nothing is joined.
        """
        src, dst, sizes = self.table
        if src.size < 2:
            return self
        joins = src[1:] - src[:-1] == sizes[:-1]
        joins &= dst[1:] - dst[:-1] == sizes[:-1]
        if np.count_nonzero(joins) < max(1, min_joins):
            return self
        if self.storages.size > 1:
            at = np.flatnonzero(joins)
            for column in (src, dst):
                joins[at[np.isin(column[1:][at], self.storages)]] = False
        is_first, is_last = np.ones(src.size, dtype=np.bool_), np.ones(src.size, dtype=np.bool_)
        is_first[1:] = is_last[:-1] = ~joins
        merged = np.empty((3, np.count_nonzero(is_first)), dtype=np.int64)
        for row, column in enumerate((src, dst)):
            np.compress(is_first, column, out=merged[row])
        merged[2] = (dst + sizes)[is_last] - merged[1]
        return replace(self, table=merged)

    def part(self, pieces: slice | npt.NDArray[np.bool_]) -> "Pieces":
        """Some of these copies; of a slice, without copying the table."""
        table = self.table[:, pieces]
        return replace(self, table=table if isinstance(pieces, slice) else np.ascontiguousarray(table))

    def split_at(self, borders: Int64s, side: str) -> "Pieces":
        """The same copies, cut so that none crosses one of `borders`: one DMA must not span two host registrations.

        Args:
            borders: addresses, int64, ascending; a piece may end or start at a border, not cross it.
            side: "src" or "dst", the side whose addresses the borders are.
        """
        addresses = self.src if side == "src" else self.dst
        first = np.searchsorted(borders, addresses, side="right")
        last = np.searchsorted(borders, addresses + self.sizes, side="left")
        cuts = last - first
        if not cuts.any():
            return self
        owner = np.repeat(np.arange(self.num_pieces), cuts + 1)
        nth = np.arange(owner.size) - np.repeat(np.cumsum(cuts + 1) - (cuts + 1), cuts + 1)
        padded = np.append(borders, np.iinfo(np.int64).max)
        start = np.where(nth == 0, addresses[owner], padded[np.maximum(first[owner] + nth - 1, 0)])
        stop = np.where(nth == cuts[owner], (addresses + self.sizes)[owner], padded[first[owner] + nth])
        shift = start - addresses[owner]
        return replace(self, table=np.stack((self.src[owner] + shift, self.dst[owner] + shift, stop - start)))
