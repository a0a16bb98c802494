"""Casts between fp32 and what blocks hold, on the device: bf16, fp8 e4m3 and small integers, rounded to nearest even.

With HARDWARE_CAST they are the GPU's conversion instructions; without, integer arithmetic with the same results bit for
bit, for GPUs without fp8 instructions (before sm_89) and for Triton's interpreter, whose casts are not exact.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl

__all__ = ["fp8_code", "fp8_value", "int_code", "narrow", "widen"]


@triton.jit
def widen(raw, IS_BF16: tl.constexpr):
    """fp32 of loaded words; bf16 arrives as uint16."""
    if IS_BF16:
        return (raw.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return raw.to(tl.float32)


@triton.jit
def narrow(x, ELEMENT: tl.constexpr, IS_BF16: tl.constexpr, HARDWARE_CAST: tl.constexpr):
    """fp32 to the stored words, to nearest even; bf16 leaves as uint16."""
    if IS_BF16:
        if HARDWARE_CAST:
            words = x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
        else:
            bits = x.to(tl.uint32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            words = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    else:
        words = x.to(ELEMENT)
    return words


@triton.jit
def _round_units(magnitude, UNIT_EXPONENT: tl.constexpr):
    """|y| in units of 2**UNIT_EXPONENT, to nearest even, from the bits of |y|; |y| below 2**23 units."""
    exponent = magnitude >> 23
    significand = (magnitude & 0x7FFFFF) | 0x800000
    shift = (150 + UNIT_EXPONENT) - exponent
    shift = tl.minimum(tl.maximum(shift, 1), 31)
    half = (1 << (shift - 1)) - 1
    return (significand + half + ((significand >> shift) & 1)) >> shift


@triton.jit
def fp8_code(y, HARDWARE_CAST: tl.constexpr):
    """e4m3 codes as uint8: nearest even, saturating, NaN as 0x7F."""
    if HARDWARE_CAST:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    code = tl.where(magnitude < (121 << 23), _round_units(magnitude, -9), tl.minimum(normal, 0x7E))
    code = code | ((bits >> 24) & 0x80)
    return tl.where(magnitude > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def int_code(y, LARGEST: tl.constexpr, HARDWARE_CAST: tl.constexpr):
    """Symmetric integer codes as int32: nearest even, saturating, NaN as 0."""
    if HARDWARE_CAST:
        code = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [y], dtype=tl.int32, is_pure=True, pack=1)
        return tl.minimum(tl.maximum(code, -LARGEST), LARGEST)
    bits = y.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    code = tl.where(magnitude < (134 << 23), tl.minimum(_round_units(magnitude, 0), LARGEST), LARGEST)
    code = tl.where(magnitude > 0x7F800000, 0, code)
    return tl.where(bits < 0, -code, code)


@triton.jit
def fp8_value(code, HARDWARE_CAST: tl.constexpr):
    """fp32 of e4m3 codes given as uint8; exact."""
    if HARDWARE_CAST:
        return code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    wide = code.to(tl.int32)
    magnitude = wide & 0x7F
    normal = ((magnitude << 20) + ((127 - 7) << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(wide >= 0x80, -value, value)
