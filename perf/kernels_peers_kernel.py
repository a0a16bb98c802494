"""Device code of other projects' ways to copy KV, rebuilt from what they publish. For comparison only.

pointer_list_kernel: vLLM's `swap_blocks` on SMs, as described in https://github.com/vllm-project/vllm/pull/42212: a few
persistent programs walk a list of (source, destination, bytes) and copy each piece as 8-byte words at addresses the
compiler knows nothing about.

universal_kernel: Dynamo's `kvbm-kernels` (https://github.com/ai-dynamo/dynamo): one element per thread, its place on both
sides found by dividing a flat index by every extent of [heads, layers, K and V, tokens, dim].
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

__all__ = ["pointer_list_kernel", "universal_kernel"]


@triton.jit
def pointer_list_kernel(src_ptr, dst_ptr, bytes_ptr, num_pieces, WORDS: tl.constexpr):
    """Grid [programs]. Reads and writes each piece once; sizes are multiples of 8 bytes."""
    for piece in range(tl.program_id(0), num_pieces, tl.num_programs(0)):
        src = tl.load(src_ptr + piece).to(tl.pointer_type(tl.int64))
        dst = tl.load(dst_ptr + piece).to(tl.pointer_type(tl.int64))
        num_words = tl.load(bytes_ptr + piece) // 8
        for start in range(0, num_words, WORDS):
            offsets = start + tl.arange(0, WORDS)
            mask = offsets < num_words
            tl.store(dst + offsets, tl.load(src + offsets, mask=mask), mask=mask)


@triton.jit
def universal_kernel(
    layer_ptr,
    block_ptr,
    universal_ptr,
    num_elements,
    block_stride,
    plane_stride,
    token_stride,
    head_stride,
    LAYERS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """Grid [elements / ELEMENTS]. Paged layers to universal blocks [block, head, layer, plane, token, dim].

    `layer_ptr` holds the address of each layer's tensor of 2-byte elements, `block_ptr` the block to read for each block
    written; strides are in elements.
    """
    flat = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    mask = flat < num_elements
    dim = flat % DIM
    token = flat // DIM % TOKENS
    plane = flat // (DIM * TOKENS) % 2
    layer = flat // (DIM * TOKENS * 2) % LAYERS
    head = flat // (DIM * TOKENS * 2 * LAYERS) % HEADS
    block = flat // (DIM * TOKENS * 2 * LAYERS * HEADS)
    base = tl.load(layer_ptr + layer, mask=mask, other=0).to(tl.pointer_type(tl.int16))
    page = tl.load(block_ptr + block, mask=mask, other=0)
    source = base + page * block_stride + plane * plane_stride + token * token_stride + head * head_stride + dim
    tl.store(universal_ptr + flat, tl.load(source, mask=mask), mask=mask)
