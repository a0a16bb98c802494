"""Makes two views alike before blocks are copied between them: same layers and heads, same groups, same block size."""

import math

import numpy as np

from dynamo.kernels.checks import KernelArgumentError, SlotIds, check_ids
from dynamo.kernels.view import View

__all__ = ["Range", "check_alike", "check_tokens", "cut_views", "match_views"]

Range = tuple[int, int]
"""First and one past the last."""


def cut_views(src: View, dst: View, layers: Range | None, heads: Range | None) -> tuple[View, View]:
    """Both views without the layers and heads outside half-open ranges; one that has exactly as many is taken whole.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> all_heads, one_rank = (from_paged(torch.zeros(4, 2, 16, h, 64), "BPTHD") for h in (8, 2))
    >>> [view.num_heads for view in cut_views(all_heads, one_rank, None, (2, 4))]
    [2, 2]

    Raises:
        KernelArgumentError: a range is empty or reaches past the wider view.
    """
    if layers is not None:
        _check_range(layers, max(src.layers_per_group, dst.layers_per_group), "layers")
        src, dst = (v if v.layers_per_group == layers[1] - layers[0] else v.slice_layers(*layers) for v in (src, dst))
    if heads is not None:
        _check_range(heads, max(src.total_heads, dst.total_heads), "heads")
        src, dst = (v if v.total_heads == heads[1] - heads[0] else v.slice_heads(*heads) for v in (src, dst))
    return src, dst


def check_alike(src: View, dst: View) -> None:
    """Checks that blocks of both views hold the same rows, but for the number of tokens.

    Raises:
        KernelArgumentError: layers, planes, heads or row bytes differ.

    >>> import torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> check_alike(*(from_paged(torch.zeros(4, tokens, 2, 8), "BTHD") for tokens in (16, 32)))
    """
    for name in ("layers_per_group", "num_planes", "total_heads", "row_bytes"):
        ours, theirs = getattr(src, name), getattr(dst, name)
        if ours != theirs:
            raise KernelArgumentError(
                f"the source has {name} {ours}, the destination {theirs}: cut or convert one side"
            )


def match_views(src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds) -> tuple[View, SlotIds, View, SlotIds]:
    """The same copy between views of equal head groups and block size: heads folded, blocks cut to the common divisor.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> large, small = (from_paged(torch.zeros(num_blocks, t, 2, 8), "BTHD") for num_blocks, t in ((4, 16), (8, 8)))
    >>> src, src_ids, dst, dst_ids = match_views(large, np.array([3, 1]), small, np.array([0, 1, 6, 7]))
    >>> src.num_tokens, src_ids.tolist(), dst_ids.tolist()
    (8, [6, 7, 2, 3], [0, 1, 6, 7])

    Args:
        src: view read.
        src_ids: int64 [n], blocks of `src`.
        dst: view written.
        dst_ids: int64 [m], blocks of `dst`; together they hold as many tokens as those of `src`.

    Raises:
        KernelArgumentError: layers, planes, heads, row bytes or numbers of tokens differ, or an id is out of range.
    """
    check_alike(src, dst)
    check_ids(src_ids, "src_ids", src.num_blocks)
    check_ids(dst_ids, "dst_ids", dst.num_blocks)
    check_tokens(src, src_ids, dst, dst_ids)
    groups = math.lcm(src.head_groups, dst.head_groups)
    src, dst = src.fold_heads(groups), dst.fold_heads(groups)
    if src.num_tokens == dst.num_tokens:
        return src, src_ids, dst, dst_ids
    num_tokens = math.gcd(src.num_tokens, dst.num_tokens)
    src_parts, dst_parts = (np.arange(view.num_tokens // num_tokens, dtype=np.int64) for view in (src, dst))
    src_ids = np.add.outer(src_ids * src_parts.size, src_parts).reshape(-1)
    dst_ids = np.add.outer(dst_ids * dst_parts.size, dst_parts).reshape(-1)
    return src.regroup(num_tokens), src_ids, dst.regroup(num_tokens), dst_ids


def check_tokens(src: View, src_ids: SlotIds, dst: View, dst_ids: SlotIds) -> None:
    """Checks that the blocks of both lists hold as many tokens.

    Raises:
        KernelArgumentError: they do not.

    >>> import numpy as np, torch
    >>> from dynamo.kernels.layouts import from_paged
    >>> small, large = (from_paged(torch.zeros(4, tokens, 2, 8), "BTHD") for tokens in (16, 32))
    >>> check_tokens(small, np.array([3, 1]), large, np.array([2]))
    """
    if src_ids.size * src.num_tokens != dst_ids.size * dst.num_tokens:
        raise KernelArgumentError(
            f"{src_ids.size} blocks of {src.num_tokens} tokens and {dst_ids.size} blocks of {dst.num_tokens} tokens "
            "are not the same tokens: the two sides must pair up"
        )


def _check_range(wanted: Range, num: int, name: str) -> None:
    if not 0 <= wanted[0] < wanted[1] <= num:
        raise KernelArgumentError(f"{name} [{wanted[0]}, {wanted[1]}) is not a range within the wider side's {num}")
