"""What the kernels must do, said as plainly as possible: one row at a time. For tests; host memory only.

Nothing here shares code with the kernels or their planning. Rows are read and written through the tensors' storages.
"""

import numpy as np
import numpy.typing as npt
import torch

from dynamo.kernels.checks import SlotIds
from dynamo.kernels.view import View

__all__ = ["block_rows", "compact_reference", "copy_blocks_reference", "row_at"]


def row_at(view: View, layer: int, plane: int, block: int, token: int, head: int) -> npt.NDArray[np.uint8]:
    """One row's bytes, uint8 [row_bytes], writable in place.

    Args:
        view: on the CPU.
        layer: a layer, not a row of `base`.
        plane: 0 for K, 1 for V.
        block: block of the view.
        token: within the block.
        head: counted over all head groups.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> keys = torch.arange(2 * 3 * 2, dtype=torch.uint8).view(2, 3, 2, 1)
    >>> row_at(from_paged(keys, "BTHD"), layer=0, plane=0, block=1, token=2, head=1)
    array([11], dtype=uint8)
    """
    group, head_in_group = divmod(head, view.num_heads)
    row = group * view.layers_per_group + layer
    address = (
        int(view.base[row, plane])
        + int(view.block_offsets[block])
        + token * view.token_stride
        + head_in_group * view.head_stride
    )
    for tensor in view.tensors:
        storage = tensor.untyped_storage()
        offset = address - storage.data_ptr()
        if offset >= 0 and offset + view.row_bytes <= storage.nbytes():
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            row_bytes: npt.NDArray[np.uint8] = whole[offset : offset + view.row_bytes].numpy()
            return row_bytes
    raise IndexError(f"no tensor of the view holds address {address}")


def block_rows(view: View, ids: SlotIds) -> npt.NDArray[np.uint8]:
    """Copies of blocks in the order [layer, plane, token of all blocks in turn, head, byte], uint8.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> block_rows(from_paged(torch.zeros(4, 2, 16, 8, 32), "BPTHD"), np.array([3, 1])).shape
    (1, 2, 32, 8, 128)
    """
    shape = (view.layers_per_group, view.num_planes, ids.size * view.num_tokens, view.total_heads, view.row_bytes)
    rows = np.empty(shape, dtype=np.uint8)
    for layer, plane, token, head in np.ndindex(*shape[:-1]):
        block = int(ids[token // view.num_tokens])
        rows[layer, plane, token, head] = row_at(view, layer, plane, block, token % view.num_tokens, head)
    return rows


def copy_blocks_reference(
    src: View,
    src_ids: SlotIds,
    dst: View,
    dst_ids: SlotIds,
    *,
    layers: tuple[int, int] | None = None,
    heads: tuple[int, int] | None = None,
) -> None:
    """`copy_blocks`, a row at a time; checks nothing.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> src, dst = torch.arange(24).view(3, 4, 2, 1), torch.zeros(3, 2, 4, 1, dtype=torch.int64)
    >>> copy_blocks_reference(from_paged(src, "BTHD"), np.array([2]), from_paged(dst, "BHTD"), np.array([0]))
    >>> dst[0, :, :, 0].tolist()
    [[16, 18, 20, 22], [17, 19, 21, 23]]
    """
    num_layers = min(src.layers_per_group, dst.layers_per_group) if layers is None else layers[1] - layers[0]
    num_heads = min(src.total_heads, dst.total_heads) if heads is None else heads[1] - heads[0]
    first_layers = [layers[0] if layers and v.layers_per_group > num_layers else 0 for v in (src, dst)]
    first_heads = [heads[0] if heads and v.total_heads > num_heads else 0 for v in (src, dst)]
    num_tokens = src_ids.size * src.num_tokens
    for layer, plane, token, head in np.ndindex(num_layers, src.num_planes, num_tokens, num_heads):
        rows = []
        for view, ids, first_layer, first_head in zip(
            (src, dst), (src_ids, dst_ids), first_layers, first_heads, strict=True
        ):
            block = int(ids[token // view.num_tokens])
            rows.append(row_at(view, first_layer + layer, plane, block, token % view.num_tokens, first_head + head))
        rows[1][:] = rows[0]


def compact_reference(pool: View, moves: npt.NDArray[np.int64]) -> None:
    """`compact`, a move at a time.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> keys = torch.arange(3).view(3, 1, 1, 1)
    >>> compact_reference(from_paged(keys, "BTHD"), np.array([[2, 0]]))
    >>> keys.flatten().tolist()
    [2, 1, 2]
    """
    for src, dst in moves:
        copy_blocks_reference(pool, np.array([src]), pool, np.array([dst]))
