"""What the paged attention kernels are compiled ahead of time as: see `dynamo.kernels.aot`."""

from typing import Any

import torch

from dynamo.kernels.aot import ARCHITECTURES, Specialization
from dynamo.kernels.paged_attention_kernel import (
    COMBINE_DIM,
    SPLITS_PADS,
    Tile,
    combine_kernel,
    decode_kernel,
    decode_tile,
    head_constants,
)
from dynamo.kernels.paged_prefill_kernel import prefill_kernel, prefill_tile
from dynamo.kernels.paged_write_kernel import write_kernel, write_tile

__all__ = ["specializations"]

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "u8": torch.float8_e4m3fn}


def specializations() -> list[Specialization]:
    """Decode, its combination, prefill and write. Caches of "u8" are float8."""
    found = [
        _decode("head_dim 128, group 4", "bf16", "bf16", 128, 128, GROUP=4),
        _decode("head_dim 128, group 1, one split", "bf16", "bf16", 128, 128, GROUP=1, one_split=True),
        _decode("head_dim 64, group 8, window", "fp16", "fp16", 64, 64, GROUP=8, WINDOW=4096),
        _decode("head_dim 80, group 1", "bf16", "bf16", 80, 80, GROUP=1),
        _decode("head_dim 96, group 7, blocks of 32", "bf16", "bf16", 96, 96, GROUP=7, BLOCK_SIZE=32),
        _decode("latents of 576 with values of 512, group 16", "bf16", "bf16", 576, 512, GROUP=16),
        _decode("head_dim 128, group 4", "fp32", "fp32", 128, 128, GROUP=4),
        _decode("head_dim 128, group 4, converted by hand", "bf16", "u8", 128, 128, GROUP=4, FP8=2),
        _decode("head_dim 128, group 4", "bf16", "u8", 128, 128, (90, 100), GROUP=4, FP8=1),
    ]
    combine = {"partial_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*bf16"}
    found += [
        Specialization(
            name=f"decode, combining up to {num_splits} splits",
            kernel=combine_kernel,
            signature=combine | dict.fromkeys(("out_seq_stride", "out_head_stride", "num_splits"), "i32"),
            constexprs={"V_DIM": 128, "SPLITS_PAD": num_splits, "BLOCK_D": COMBINE_DIM},
            divisible_by_16=(*combine, "out_seq_stride", "out_head_stride"),
            num_warps=4,
            max_registers=168,
            loaded_bytes=num_splits * COMBINE_DIM * 4,
            narrow_loads=20,
        )
        for num_splits in SPLITS_PADS
    ]
    found += [
        _prefill("head_dim 128, group 4", "bf16", 128, 128, GROUP=4),
        _prefill("head_dim 64, group 1", "fp16", 64, 64, GROUP=1),
        _prefill("head_dim 96, group 7, window", "bf16", 96, 96, GROUP=7, WINDOW=4096),
        _prefill("keys of 192, values of 128", "bf16", 192, 128, GROUP=1),
        _prefill("latents of 576 with values of 512, group 16", "bf16", 576, 512, GROUP=16),
        _prefill("head_dim 128, group 4", "fp32", 128, 128, GROUP=4),
        _prefill("head_dim 128, group 4, converted by hand", "bf16", 128, 128, "u8", GROUP=4, FP8=2),
        _prefill("head_dim 128, group 4", "bf16", 128, 128, "u8", (90, 100), GROUP=4, FP8=1),
    ]
    found += [_write("bf16", 128, 8), _write("fp32", 64, 4), _write("bf16", 80, 32)]
    return found


def _decode(
    case: str,
    dtype: str,
    cache: str,
    k_dim: int,
    v_dim: int,
    architectures: tuple[int, ...] = ARCHITECTURES,
    *,
    one_split: bool = False,
    **constants: int,
) -> Specialization:
    tile = decode_tile(_TORCH_DTYPES[cache], k_dim)
    return _specialization(
        decode_kernel, "decode", case, dtype, cache, k_dim, v_dim, tile, architectures, constants, partial=not one_split
    )


def _specialization(
    kernel: Any,
    verb: str,
    case: str,
    dtype: str,
    cache: str,
    k_dim: int,
    v_dim: int,
    tile: Tile,
    architectures: tuple[int, ...],
    constants: dict[str, int],
    *,
    partial: bool = False,
) -> Specialization:
    """One way decode or prefill is launched, with the strides of a cache that 16 divides and int32 tables."""
    constexprs: dict[str, int | bool | None] = {
        "BLOCK_SIZE": 16,
        "WINDOW": 0,
        "FP8": 0,
        **head_constants(k_dim, v_dim, is_prefix=k_dim > 256),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "NUM_STAGES": tile.num_stages,
        **constants,
    }
    if cache != "u8":
        constexprs |= {"k_scale_ptr": None, "v_scale_ptr": None}
    if not partial:
        constexprs |= {name: None for name in ("partial_ptr", "weight_ptr") if name in kernel.arg_names}
    pointers = {"q_ptr": dtype, "out_ptr": dtype, "k_ptr": cache, "v_ptr": cache, "score_scale": "fp32"}
    pointers |= dict.fromkeys(("partial_ptr", "weight_ptr", "k_scale_ptr", "v_scale_ptr"), "fp32")
    signature = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "i32")
        else:
            signature[name] = "i64" if name.endswith("_block_stride") else pointers.get(name, "i32")
    signature = {name: kind for name, kind in signature.items() if name not in constexprs and not name.isupper()}
    loose = ("table_stride", "k_scale_stride", "v_scale_stride")
    aligned = [name for name in signature if name.endswith(("_ptr", "_stride")) and name not in loose]
    row_bytes = (k_dim + (0 if constexprs["VALUE_IS_KEY"] else v_dim)) * _TORCH_DTYPES[cache].itemsize
    return Specialization(
        name=f"{verb}, {dtype} over {'fp8' if cache == 'u8' else cache}, {case}",
        kernel=kernel,
        signature=signature,
        constexprs=constexprs,
        divisible_by_16=tuple(aligned),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=255,
        # Values of float8 are loaded 64 bits at a time: that is what the layout of their shared memory takes.
        loaded_bytes=row_bytes * tile.block_n if cache != "u8" else 0,
        narrow_loads=48,
        stored_bytes=tile.block_m * v_dim * (4 if partial else _TORCH_DTYPES[dtype].itemsize),
        narrow_stores=1,
        architectures=architectures,
    )


def _prefill(
    case: str,
    dtype: str,
    k_dim: int,
    v_dim: int,
    cache: str | None = None,
    architectures: tuple[int, ...] = ARCHITECTURES,
    **constants: int,
) -> Specialization:
    tile = prefill_tile(torch.float32 if dtype == "fp32" else torch.bfloat16, k_dim)
    return _specialization(
        prefill_kernel, "prefill", case, dtype, cache or dtype, k_dim, v_dim, tile, architectures, constants
    )


def _write(dtype: str, head_dim: int, num_heads: int) -> Specialization:
    itemsize = _TORCH_DTYPES[dtype].itemsize
    block_h, block_d, num_warps = write_tile(num_heads, head_dim, itemsize)
    pointers = dict.fromkeys(("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{dtype}")
    places = {"block_ptr": "*i64", "offset_ptr": "*i64"}
    strides = {
        name: "i64" if name.endswith("_block_stride") else "i32"
        for name in write_kernel.arg_names
        if name.endswith("_stride")
    }
    return Specialization(
        name=f"write, {dtype}, {num_heads} heads of {head_dim}",
        kernel=write_kernel,
        signature=pointers | places | strides | {"num_blocks": "i32"},
        constexprs={
            "NUM_HEADS": num_heads,
            "BLOCK_SIZE": 16,
            "K_DIM": head_dim,
            "V_DIM": head_dim,
            "BLOCK_H": block_h,
            "BLOCK_D": block_d,
        },
        divisible_by_16=(*pointers, *places, *strides),
        num_warps=num_warps,
        max_registers=64,
        loaded_bytes=2 * block_h * head_dim * itemsize,
        stored_bytes=2 * block_h * head_dim * itemsize,
        narrow_loads=2,
    )
