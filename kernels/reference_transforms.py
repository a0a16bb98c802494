"""References of the kernels that change blocks while they copy them: slow, short, for tests only.

Every function works on whole blocks, [num_blocks, num_layers, num_planes, num_tokens, num_heads, ...], on the CPU, and is
written from the definition, not from the kernels: Python integers and fp64 where the kernels use tricks.
"""

import math

import torch
from torch import Tensor

__all__ = ["dequantize_reference", "digest_reference", "quantize_reference", "rope_shift_reference"]

_LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0, "int4": 7.0}
_SMALLEST_SCALE = 2.0**-126
_LARGEST_AMAX = (2**24 - 2) * 2.0**104
_MASK = (1 << 64) - 1


def quantize_reference(blocks: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Values on the grid of `dtype`, before they are packed, and the scale of each block, layer, plane and head.

    Args:
        blocks: fp32, fp16 or bf16 [n, num_layers, num_planes, num_tokens, num_heads, head_dim].
        dtype: "fp8_e4m3", "int8" or "int4".

    Returns:
        fp32 values of the same shape, NaN where fp8 keeps a NaN; fp32 scales [n, num_layers, num_planes, num_heads].
    """
    x = blocks.float()
    finite = torch.where(x.isfinite(), x.abs(), torch.zeros_like(x))
    amax = finite.amax(dim=(3, 5)).clamp(max=_LARGEST_AMAX)
    scales = (amax / _LARGEST[dtype]).clamp(min=_SMALLEST_SCALE)
    inverse = 1.0 / scales
    y = x * inverse[:, :, :, None, :, None]
    if dtype == "fp8_e4m3":
        exponent = torch.frexp(y.double().abs().nan_to_num(posinf=448.0)).exponent.sub(1).clamp(min=-6)
        step = torch.pow(torch.tensor(2.0, dtype=torch.float64), exponent - 3)
        return ((y.double() / step).round() * step).clamp(-448.0, 448.0).float(), scales
    limit = _LARGEST[dtype]
    return y.nan_to_num(nan=0.0, posinf=limit, neginf=-limit).round().clamp(-limit, limit), scales


def dequantize_reference(values: Tensor, scales: Tensor, elements: torch.dtype) -> Tensor:
    """What is read back: grid value times scale in fp32, rounded to `elements`."""
    return (values * scales[:, :, :, None, :, None]).to(elements)


def digest_reference(blocks: Tensor, seeds: list[int]) -> list[int]:
    """Digests by Python integers.

    Args:
        blocks: uint8 [n, num_layers, num_planes, num_tokens, num_heads, row_bytes].
        seeds: n numbers in [0, 2**64).
    """
    shape = blocks.shape[1:]
    words = -(-shape[-1] // 8)
    shape_key = 0
    for size in shape:
        shape_key = _mix(shape_key + size)
    keys = [_mix((j + 1) * _GOLDEN & _MASK) | 1 for j in range(words)]
    digests = []
    for block, seed in zip(blocks.flatten(1, 4), seeds, strict=True):
        total = _mix(seed ^ shape_key)
        for position, row in enumerate(block):
            data = bytes(row.tolist()).ljust(8 * words, b"\0")
            row_sum = 0
            for j, key in enumerate(keys):
                word = int.from_bytes(data[8 * j : 8 * j + 8], "little")
                row_sum += (word ^ (word >> 32)) * key
            total += _mix(row_sum + (position + 1) * _GOLDEN)
        digests.append(_mix(total))
    return digests


_GOLDEN = 0x9E3779B97F4A7C15


def _mix(x: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit words."""
    x &= _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def rope_shift_reference(
    keys: Tensor, deltas: list[int], inv_freq: Tensor, *, interleaved: bool, rotary_offset: int = 0
) -> Tensor:
    """Keys rotated by `deltas` positions in fp64, rounded once to their dtype.

    Args:
        keys: [n, num_layers, num_tokens, num_heads, head_dim].
        deltas: one number of positions per block.
        inv_freq: [rotary_dim / 2] radians per position.
        interleaved: pairs (2i, 2i + 1) instead of (i, i + rotary_dim / 2).
        rotary_offset: first rotated element of a row.
    """
    half = inv_freq.numel()
    x = keys.to(torch.float64, copy=True)
    part = x[..., rotary_offset : rotary_offset + 2 * half]
    lead = part.shape[:-1]
    pairs = part.reshape(*lead, half, 2) if interleaved else part.reshape(*lead, 2, half).transpose(-1, -2)
    rotated = torch.empty_like(pairs)
    for i, delta in enumerate(deltas):
        for j, frequency in enumerate(inv_freq.tolist()):
            c, s = math.cos(delta * frequency), math.sin(delta * frequency)
            rotated[i, ..., j, 0] = pairs[i, ..., j, 0] * c - pairs[i, ..., j, 1] * s
            rotated[i, ..., j, 1] = pairs[i, ..., j, 1] * c + pairs[i, ..., j, 0] * s
    merged = rotated.flatten(-2) if interleaved else rotated.transpose(-1, -2).flatten(-2)
    x[..., rotary_offset : rotary_offset + 2 * half] = merged
    return x.to(keys.dtype)
