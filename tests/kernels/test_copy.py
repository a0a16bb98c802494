"""Row copies agree with the plain loop for every pattern of ids."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.copy import copy_rows, shared_runs

ROW_BYTES = 96


def ids(*numbers: int) -> npt.NDArray[np.int64]:
    return np.array(numbers, dtype=np.int64)


def random_rows(num_rows: int, seed: int, row_bytes: int = ROW_BYTES) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (num_rows, row_bytes), dtype=np.uint8)


def expect_copied(src_ids: npt.NDArray[np.int64], dst_ids: npt.NDArray[np.int64]) -> None:
    src, dst = random_rows(20, 1), random_rows(24, 2)
    before = dst.copy()
    copy_rows(src, src_ids, dst, dst_ids)
    for s, d in zip(src_ids.tolist(), dst_ids.tolist(), strict=True):
        assert (dst[d] == src[s]).all()
    untouched = np.setdiff1d(np.arange(24), dst_ids)
    assert (dst[untouched] == before[untouched]).all()


@given(
    pairs=st.integers(0, 20).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 19), min_size=n, max_size=n),
            st.permutations(range(24)).map(lambda order: order[:n]),
        )
    ),
)
def test_any_ids_are_copied_and_nothing_else(pairs: tuple[list[int], list[int]]) -> None:
    expect_copied(ids(*pairs[0]), ids(*pairs[1]))


@pytest.mark.parametrize(
    ("src_ids", "dst_ids"),
    [
        pytest.param(range(3, 9), range(11, 17), id="run-to-run"),
        pytest.param([7, 1, 1, 19], range(4, 8), id="scattered-to-run"),
        pytest.param(range(2, 6), [9, 0, 23, 4], id="run-to-scattered"),
        pytest.param([5, 6, 7, 0, 1], [20, 21, 22, 3, 4], id="two-shared-runs"),
        pytest.param([5, 4, 3], [0, 2, 4], id="nothing-shared"),
        pytest.param([], [], id="empty"),
        pytest.param([19], [23], id="last-rows"),
    ],
)
def test_each_way_of_copying(src_ids: list[int], dst_ids: list[int]) -> None:
    expect_copied(ids(*src_ids), ids(*dst_ids))


def test_shared_runs_are_where_both_sides_step_by_one() -> None:
    assert shared_runs(ids(3, 4, 5, 9, 10), ids(7, 8, 2, 3, 4)).tolist() == [0, 2, 3, 5]
    assert shared_runs(ids(), ids()).tolist() == [0]
    assert shared_runs(ids(5), ids(1)).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "message"),
    [
        (ids(20), ids(0), r"src_ids holds 20, outside \[0, 20\)"),
        (ids(-1), ids(0), r"src_ids holds -1"),
        (ids(0), ids(24), r"dst_ids holds 24, outside \[0, 24\)"),
        (ids(0, 1), ids(0), r"dst_ids has 1 ids, 2 are needed"),
        (ids(0).astype(np.int32), ids(0), r"src_ids must be a 1-D numpy int64 array"),
        (ids(0).reshape(1, 1), ids(0), r"src_ids must be a 1-D"),
    ],
)
def test_wrong_ids_are_refused_and_nothing_is_copied(
    src_ids: npt.NDArray[np.int64], dst_ids: npt.NDArray[np.int64], message: str
) -> None:
    src, dst = random_rows(20, 1), random_rows(24, 2)
    before = dst.copy()
    with pytest.raises(KernelArgumentError, match=message):
        copy_rows(src, src_ids, dst, dst_ids)
    assert (dst == before).all()


def test_wrong_rows_are_refused() -> None:
    rows = random_rows(4, 1)
    frozen = rows.copy()
    frozen.flags.writeable = False
    with pytest.raises(KernelArgumentError, match="dst has rows of 48 bytes, 96 are needed"):
        copy_rows(rows, ids(0), random_rows(4, 1, 48), ids(0))
    with pytest.raises(KernelArgumentError, match="src must be a numpy uint8 array"):
        copy_rows(rows.view(np.int8), ids(0), rows, ids(1))  # type: ignore[arg-type]
    with pytest.raises(KernelArgumentError, match="C-contiguous"):
        copy_rows(rows[:, ::2], ids(0), rows, ids(1))
    with pytest.raises(KernelArgumentError, match="read-only"):
        copy_rows(rows, ids(0), frozen, ids(0))


def test_a_row_written_twice_is_refused() -> None:
    src, dst = random_rows(20, 1), random_rows(24, 2)
    before = dst.copy()
    with pytest.raises(KernelArgumentError, match="dst_ids holds 3 more than once"):
        copy_rows(src, ids(0, 1, 2), dst, ids(3, 5, 3))
    assert (dst == before).all()
    with pytest.raises(KernelArgumentError, match="dst_ids holds 3 more than once"):
        copy_rows(src[:, :0], ids(0, 1, 2), np.zeros((10_000, 0), dtype=np.uint8), ids(3, 5, 3))


@pytest.mark.parametrize(
    "row_bytes", [4 << 10, 40 << 10, 96 << 10, (96 << 10) + 4, 2 << 20]
)  # 2 MiB in pieces of 32 KiB
@pytest.mark.parametrize("order", ["gather", "scatter", "sparse scatter", "runs", "runs to runs", "one run"])
def test_copies_large_enough_to_share_with_other_threads(row_bytes: int, order: str) -> None:
    count = (24 << 20) // row_bytes // 4 * 4
    numbers = np.arange(count, dtype=np.int64)
    shuffled = np.random.default_rng(3).permutation(count).astype(np.int64)
    runs = numbers.reshape(-1, 4)[::-1].reshape(-1)
    src_ids, dst_ids = {
        "gather": (shuffled, numbers),
        "scatter": (numbers, shuffled),
        "sparse scatter": (numbers, 2 * shuffled),
        "runs": (runs, numbers),
        "runs to runs": (runs, 2 * (runs // 4 * 4) + runs % 4),
        "one run": (numbers, numbers + 7),
    }[order]
    src = random_rows(count, 1, row_bytes)
    dst = np.zeros((2 * count + 8, row_bytes), dtype=np.uint8)
    copy_rows(src, src_ids, dst, dst_ids)
    assert (dst[dst_ids] == src[src_ids]).all()
    untouched = np.setdiff1d(np.arange(dst.shape[0]), dst_ids)
    assert not dst[untouched].any()
