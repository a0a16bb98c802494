"""What paged decode and paged prefill have in common on the device: a tile of query rows that goes over paged keys.

Bytes moved: those of the keys and values in the range that a program attends to, as `attend_keys` is told; the queries once.
Grid: none of its own; the kernels of `paged_attention_kernel` and `paged_prefill_kernel` inline these functions.

Online softmax over paged keys is PagedAttention's (https://arxiv.org/abs/2309.06180) and FlashAttention-2's
(https://arxiv.org/abs/2307.08691).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped"

import triton
import triton.language as tl

__all__ = ["attend_keys", "fresh_state", "load_queries", "scaled_for"]


@triton.jit
def _widen(x, DTYPE: tl.constexpr, FP8: tl.constexpr):
    """Float8 (e4m3) bytes as DTYPE, exactly; other dtypes pass through.

    Before compute capability 8.9 there is no conversion: the seven low bits, moved under float16's wider exponent, are the
    value divided by 2**8, subnormals included.
    """
    widened = x
    if FP8 == 1:
        widened = x.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    if FP8 == 2:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        value = half.to(tl.float32) * 256.0
        widened = tl.where((bits & 0x7F) == 0x7F, float("nan"), value).to(DTYPE)
    return widened


@triton.jit
def load_queries(q_ptr, row_offsets, row_valid, K_DIM: tl.constexpr, K_MAIN: tl.constexpr, K_REST: tl.constexpr):
    """The two parts of the queries, [BLOCK_M, K_MAIN] and [BLOCK_M, K_REST]; without a rest, the first twice."""
    main = tl.arange(0, K_MAIN)
    main_valid = row_valid[:, None] & (main < K_DIM)[None, :]
    q_main = tl.load(q_ptr + row_offsets[:, None] + main[None, :], mask=main_valid, other=0.0)
    q_rest = q_main
    if K_REST > 0:
        rest = K_MAIN + tl.arange(0, K_REST)
        rest_valid = row_valid[:, None] & (rest < K_DIM)[None, :]
        q_rest = tl.load(q_ptr + row_offsets[:, None] + rest[None, :], mask=rest_valid, other=0.0)
    return q_main, q_rest


@triton.jit
def scaled_for(kv_head, x, scale_ptr, scale_stride):
    """x times the scale of a key head, or as it is where the cache has no scales."""
    scaled = x
    if scale_ptr is not None:
        scaled = x * tl.load(scale_ptr + kv_head * scale_stride)
    return scaled


@triton.jit
def fresh_state(BLOCK_M: tl.constexpr, V_PAD: tl.constexpr):
    """What `attend_keys` starts from: acc, row_sum and row_max of rows that have seen no key."""
    acc = tl.zeros([BLOCK_M, V_PAD], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return acc, row_sum, row_max


@triton.jit
def attend_keys(
    acc,
    row_sum,
    row_max,
    q_main,
    q_rest,
    positions,
    k_ptr,
    v_ptr,
    table_ptr,
    first,
    last,
    lowest,
    context_len,
    max_blocks,
    num_blocks,
    k_block_stride,
    k_token_stride,
    v_block_stride,
    v_token_stride,
    score_scale,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
    K_DIM: tl.constexpr,
    K_MAIN: tl.constexpr,
    K_REST: tl.constexpr,
    V_DIM: tl.constexpr,
    V_PAD: tl.constexpr,
    VALUE_IS_KEY: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Online softmax of a tile of rows over keys [first, last), `first` a multiple of BLOCK_N, none below `lowest`.

    Args:
        acc: float32 [BLOCK_M, V_PAD], sum of weighted values; with row_sum and row_max (base 2) it is the state, returned.
        positions: int32 [BLOCK_M], the last key each row may see; read when MASKED.
        k_ptr: at the key head; likewise v_ptr.
        table_ptr: at the sequence's row of the block tables.
        score_scale: includes log2(e) and the keys' scale.
        WINDOW: keys a row sees, 0 for all.
        MASKED: whether some row must not see some of the keys.
    """
    main = tl.arange(0, K_MAIN)
    value_dims = tl.arange(0, V_PAD)
    for start in tl.range(first, last, BLOCK_N, num_stages=NUM_STAGES):
        tokens = start + tl.arange(0, BLOCK_N)
        inside = (tokens >= lowest) & (tokens < context_len)
        column = tokens // BLOCK_SIZE
        block = tl.load(table_ptr + column, mask=inside & (column < max_blocks), other=-1).to(tl.int64)
        # A block that does not exist is never followed; the NaN below says so.
        known = (block >= 0) & (block < num_blocks)
        k_rows = block * k_block_stride + (tokens % BLOCK_SIZE) * k_token_stride
        main_valid = known[:, None] & (main < K_DIM)[None, :]
        k_main = tl.load(k_ptr + k_rows[:, None] + main[None, :], mask=main_valid, other=0)
        k_main = _widen(k_main, q_main.dtype, FP8)
        scores = tl.dot(q_main, tl.trans(k_main), input_precision="ieee")
        if K_REST > 0:
            rest = K_MAIN + tl.arange(0, K_REST)
            rest_valid = known[:, None] & (rest < K_DIM)[None, :]
            k_rest = tl.load(k_ptr + k_rows[:, None] + rest[None, :], mask=rest_valid, other=0)
            scores = tl.dot(q_rest, tl.trans(_widen(k_rest, q_main.dtype, FP8)), scores, input_precision="ieee")
        scores = scores * score_scale
        if MASKED:
            visible = inside[None, :] & (tokens[None, :] <= positions[:, None])
            if WINDOW > 0:
                visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, float("-inf"))
        scores = tl.where((inside & (known == 0))[None, :], float("nan"), scores)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key yet must not subtract infinities.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        if VALUE_IS_KEY:
            values = k_main
        else:
            v_rows = block * v_block_stride + (tokens % BLOCK_SIZE) * v_token_stride
            v_valid = known[:, None] & (value_dims < V_DIM)[None, :]
            values = tl.load(v_ptr + v_rows[:, None] + value_dims[None, :], mask=v_valid, other=0)
            values = _widen(values, q_main.dtype, FP8)
        acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision="ieee")
    return acc, row_sum, row_max
