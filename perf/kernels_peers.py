"""Other projects' ways to copy KV on a GPU, launched beside ours. Rebuilt from public descriptions; none of their code."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.driver import CudaDriver

__all__ = ["PointerList", "UniversalPack", "copy_one_by_one"]

VLLM_PROGRAMS = 12
"""Persistent programs of vLLM's kernel: what its authors found enough for an H100's PCIe link."""

_WORDS, _ELEMENTS = 1024, 1024

Int64s = npt.NDArray[np.int64]


class PointerList:
    """vLLM's kernel: a list of (source, destination, bytes), 8 bytes per access, on a few persistent programs."""

    def __init__(self, src: Int64s, dst: Int64s, sizes: Int64s, device: torch.device) -> None:
        """Uploads the list; addresses must be valid on `device`, sizes multiples of 8."""
        self._src, self._dst, self._sizes = (
            torch.from_numpy(np.ascontiguousarray(column)).to(device) for column in (src, dst, sizes)
        )

    def run(self, programs: int = VLLM_PROGRAMS) -> None:
        """Queues one copy of all pieces on torch's current stream."""
        from dynamo.perf.kernels_peers_kernel import pointer_list_kernel

        pointer_list_kernel[(programs,)](
            self._src, self._dst, self._sizes, self._src.numel(), WORDS=_WORDS, num_warps=8, enable_fp_fusion=True
        )


class UniversalPack:
    """Dynamo's kernel: paged NHD layers to blocks [head, layer, plane, token, dim], one element per thread."""

    def __init__(self, layers: Sequence[Tensor], blocks: Int64s, universal: Tensor) -> None:
        """Describes a copy.

        Args:
            layers: 2-byte elements [2, num_blocks, tokens, heads, dim] each, alike.
            blocks: int64 [n], block to read for each block written.
            universal: 2-byte elements, contiguous [n, heads, layers, 2, tokens, dim].
        """
        first = layers[0]
        self._layers = list(layers)  # kept alive: the kernel knows addresses only
        self._addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64, device=first.device)
        self._blocks = torch.from_numpy(blocks).to(first.device)
        self._universal = universal.view(torch.int16)
        self._strides = (first.stride(1), first.stride(0), first.stride(2), first.stride(3))
        self._shape = {"LAYERS": len(layers), "TOKENS": first.shape[2], "HEADS": first.shape[3], "DIM": first.shape[4]}

    def run(self) -> None:
        """Queues the copy on torch's current stream."""
        from dynamo.perf.kernels_peers_kernel import universal_kernel

        count = self._universal.numel()
        universal_kernel[(-(-count // _ELEMENTS),)](
            self._addresses, self._blocks, self._universal, count, *self._strides, **self._shape,
            ELEMENTS=_ELEMENTS, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip


def copy_one_by_one(driver: CudaDriver, src: Int64s, dst: Int64s, sizes: Int64s, stream: int) -> None:
    """One cudaMemcpyAsync per piece, as vLLM's `swap_blocks` did for years; here the loop is Python's."""
    for source, target, size in zip(src.tolist(), dst.tolist(), sizes.tolist(), strict=True):
        driver.memcpy_async(target, source, size, stream)
