"""What every tier promises; a new tier joins by a parameter of the `open_tier` fixture."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest

from dynamo.kernels.checks import KernelArgumentError, Rows
from dynamo.tiers.errors import TierClosedError
from dynamo.tiers.layout import BlockLayout


def ids(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


class TestTierContract:
    """Runs once per tier."""

    @pytest.mark.parametrize(
        ("slots", "row_ids"),
        [
            pytest.param([0], [0], id="first"),
            pytest.param([23], [31], id="last"),
            pytest.param(range(24), range(24), id="all"),
            pytest.param(range(5, 12), range(20, 27), id="run"),
            pytest.param([9, 2, 17, 3], [4, 5, 6, 7], id="scattered-to-run"),
            pytest.param([4, 5, 6, 7], [30, 1, 12, 0], id="run-to-scattered"),
            pytest.param([23, 0, 1, 2, 11], [3, 8, 9, 10, 0], id="mixed"),
            pytest.param(range(23, -1, -1), range(24), id="backwards"),
        ],
    )
    def test_read_gives_what_is_stored(self, open_tier, layout, contents, rows, slots, row_ids) -> None:
        before = rows.copy()
        outcomes = open_tier.tier.read(ids(*slots), rows, ids(*row_ids))
        assert outcomes.dtype == np.bool_
        assert outcomes.tolist() == [True] * len(slots)
        for slot, row in zip(slots, row_ids, strict=True):
            assert rows[row, : layout.block_bytes].tobytes() == contents[slot]
        others = np.setdiff1d(np.arange(len(rows)), ids(*row_ids))
        assert (rows[others] == before[others]).all()

    @pytest.mark.parametrize(
        ("slots", "row_ids"),
        [
            pytest.param([23], [0], id="last"),
            pytest.param(range(24), range(24), id="all"),
            pytest.param([9, 2, 17, 3], [4, 5, 6, 7], id="run-to-scattered"),
            pytest.param([4, 5, 6, 7], [30, 1, 12, 0], id="scattered-to-run"),
            pytest.param([4, 5, 6], [9, 9, 9], id="one-row-to-many"),
        ],
    )
    def test_write_stores_the_rows_and_touches_no_other_slot(
        self, open_tier, layout, contents, rows, slots, row_ids
    ) -> None:
        outcomes = open_tier.tier.write(ids(*slots), rows, ids(*row_ids))
        assert outcomes.dtype == np.bool_
        assert outcomes.tolist() == [True] * len(slots)
        written = dict(zip(slots, row_ids, strict=True))
        for slot in range(24):
            expected = rows[written[slot], : layout.block_bytes].tobytes() if slot in written else contents[slot]
            assert open_tier.stored(slot) == expected

    def test_the_last_write_is_what_is_read(self, open_tier, layout, rows) -> None:
        tier = open_tier.tier
        for row in (3, 7, 5):
            assert tier.write(ids(11), rows, ids(row)).all()
        assert tier.read(ids(11), rows, ids(30)).all()
        assert (rows[30, : layout.block_bytes] == rows[5, : layout.block_bytes]).all()

    def test_nothing_asked_is_nothing_done(self, open_tier, rows) -> None:
        before = rows.copy()
        assert open_tier.tier.read(ids(), rows, ids()).shape == (0,)
        assert open_tier.tier.write(ids(), rows, ids()).shape == (0,)
        assert (rows == before).all()

    @pytest.mark.parametrize("method", ["read", "write"])
    @pytest.mark.parametrize(
        ("slots", "row_ids", "message"),
        [
            (ids(24), ids(0), "holds 24, outside"),
            (ids(-1), ids(0), "holds -1, outside"),
            (ids(0), ids(32), "holds 32, outside"),
            (ids(0, 1), ids(0), "must pair up"),
            (ids(0).astype(np.int32), ids(0), "1-D numpy int64"),
        ],
    )
    def test_wrong_ids_are_refused(self, open_tier, contents, rows, method, slots, row_ids, message) -> None:
        with pytest.raises(KernelArgumentError, match=message):
            getattr(open_tier.tier, method)(slots, rows, row_ids)
        assert open_tier.stored(0) == contents[0]

    @pytest.mark.parametrize("method", ["read", "write"])
    def test_wrong_rows_are_refused(self, open_tier, rows, method) -> None:
        move = getattr(open_tier.tier, method)
        for wrong in (rows.view(np.int8), rows[:, :2048].copy(), rows[:, ::2], rows.reshape(-1)):
            with pytest.raises(KernelArgumentError):
                move(ids(0), wrong, ids(0))

    def test_read_only_rows_can_be_written_from_but_not_read_into(self, open_tier, layout, rows) -> None:
        rows.flags.writeable = False
        assert open_tier.tier.write(ids(1), rows, ids(2)).all()
        assert open_tier.stored(1) == rows[2, : layout.block_bytes].tobytes()
        with pytest.raises(KernelArgumentError, match="read-only"):
            open_tier.tier.read(ids(1), rows, ids(2))

    def test_threads_on_disjoint_slots_do_not_disturb_each_other(
        self, open_tier, layout: BlockLayout, rows: Rows
    ) -> None:
        tier = open_tier.tier
        source = rows.copy()

        def worker(index: int) -> None:
            slots = ids(index, index + 8, index + 16)
            own_rows = ids(index, index + 8, index + 16)
            for turn in range(20):
                picks = ids(*[(index + 5 * turn + k) % 32 for k in range(3)])
                rows[own_rows] = source[picks]
                assert tier.write(slots, rows, own_rows).all()
                rows[own_rows] = 0
                assert tier.read(slots, rows, own_rows).all()
                assert (rows[own_rows, : layout.block_bytes] == source[picks, : layout.block_bytes]).all()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(worker, range(8)))

    def test_stats_count_blocks_bytes_and_time(self, open_tier, layout, rows) -> None:
        tier = open_tier.tier
        tier.read(ids(1, 2, 3), rows, ids(0, 1, 2))
        tier.write(ids(4, 9), rows, ids(0, 1))
        tier.write(ids(5), rows, ids(0))
        stats = tier.stats()
        assert (stats.name, stats.num_slots) == (tier.name, 24)
        assert (stats.read.blocks, stats.read.bytes) == (3, 3 * layout.block_bytes)
        assert (stats.write.blocks, stats.write.bytes, stats.write.calls) == (3, 3 * layout.block_bytes, 2)
        assert stats.read.seconds > 0
        assert stats.write.seconds > 0
        assert stats.path
        assert stats.faults == {}

    def test_a_closed_tier_refuses_work_and_may_be_closed_again(self, open_tier, rows) -> None:
        tier = open_tier.tier
        tier.close()
        tier.close()
        with pytest.raises(TierClosedError):
            tier.read(ids(0), rows, ids(0))
        with pytest.raises(TierClosedError):
            tier.write(ids(0), rows, ids(0))
        assert tier.stats().num_slots == 24
