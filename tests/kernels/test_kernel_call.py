"""Launches are refused when they are built, before any other part of a call has written."""

import numpy as np
import pytest

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.kernel_call import KernelCall


def test_more_items_than_a_kernel_counts_are_refused_before_the_launch() -> None:
    table = np.zeros(1, dtype=np.int64)
    for num_items in (0, 2**31 - 1):
        KernelCall(kernel=None, table=table, arguments=(), constexprs={}, num_items=num_items, num_warps=4)
    with pytest.raises(KernelArgumentError, match="2147483648 tiles are more than one launch takes"):
        KernelCall(kernel=None, table=table, arguments=(), constexprs={}, num_items=2**31, num_warps=4)


def test_rows_wider_than_a_tile_are_refused() -> None:
    pytest.importorskip("triton")
    import torch

    from dynamo.kernels.digest_blocks_kernel import tile_rows
    from dynamo.kernels.quantize_kernel import constants

    assert tile_rows(16, 16384) == 1
    with pytest.raises(KernelArgumentError, match="rows of 16392 bytes are wider than the 16384"):
        tile_rows(16, 16392)
    layout = {"num_tokens": 16, "num_heads": 1, "elements": torch.bfloat16, "dtype": "int8", "align_bytes": 16}
    assert constants(**layout, head_dim=8192, code_align_bytes=16, hardware_cast=False)["TILE_TOKENS"] == 1
    with pytest.raises(KernelArgumentError, match="rows of 8200 elements are wider than the 8192"):
        constants(**layout, head_dim=8200, code_align_bytes=16, hardware_cast=False)
