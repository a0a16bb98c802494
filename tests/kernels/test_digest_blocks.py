"""Block digests: one value per content in every layout, and what they find."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo.kernels.checks import KernelArgumentError
from dynamo.kernels.digest_blocks import copy_blocks_digest, digest_blocks, digest_blocks_new
from dynamo.kernels.digest_host import row_keys
from dynamo.kernels.layouts import from_paged, stored
from dynamo.kernels.reference_transforms import digest_reference

AXES = "BLPTHD"


def digests(blocks, seeds=None):
    """Digests of bytes [block, layer, plane, token, head, byte] as a list."""
    return digest_blocks_new(from_paged(blocks, AXES), np.arange(blocks.shape[0]), seeds).tolist()


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*(st.integers(1, 3) for _ in range(5)), st.integers(1, 40)),
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=3, max_size=3),
)
def test_digests_equal_the_reference(shape, seeds):
    blocks = random_bytes(*shape)
    seeds = seeds[: shape[0]]
    assert digests(blocks, np.array(seeds, dtype=np.uint64)) == digest_reference(blocks, seeds)


def test_digests_never_change_between_versions():
    blocks = (torch.arange(2 * 2 * 2 * 4 * 2 * 20) % 251).to(torch.uint8).view(2, 2, 2, 4, 2, 20)
    assert digests(blocks, np.array([0, 7], dtype=np.uint64)) == [0x509C3C51CF0FED5, 0x85CAD7BE4B840FAE]


@pytest.mark.parametrize("axes", ["BLPHTD", "LPBTHD", "PLBHTD", "BLTHPD", "BTLHPD"])
def test_every_layout_gives_the_same_digest(axes):
    blocks = random_bytes(3, 2, 2, 5, 4, 24)
    other = blocks.permute(*(AXES.index(letter) for letter in axes)).contiguous()
    assert digest_blocks_new(from_paged(other, axes), np.arange(3)).tolist() == digests(blocks)


@pytest.mark.parametrize("head_groups", [1, 2, 4])
def test_stored_blocks_with_groups_of_heads_give_the_same_digest(head_groups):
    blocks = random_bytes(3, 2, 2, 5, 4, 24)
    slots = random_bytes(3, 2 * 2 * 5 * 4 * 24 + 40)
    view = stored(slots, num_layers=2, num_tokens=5, num_heads=4, row_bytes=24, head_groups=head_groups)
    out = torch.zeros(3, dtype=torch.uint64)
    copy_blocks_digest(from_paged(blocks, AXES), np.array([2, 0, 1]), view, np.array([2, 0, 1]), out)
    assert out.tolist() == [digests(blocks)[i] for i in (2, 0, 1)]
    assert digest_blocks_new(view, np.arange(3)).tolist() == digests(blocks)


@pytest.mark.parametrize("row_bytes", [12, 16, 7])
def test_every_single_flipped_bit_of_a_block_is_found(row_bytes):
    block = random_bytes(1, 2, 2, 3, 2, row_bytes)
    num_bits = block.numel() * 8
    flipped = block.view(1, -1).repeat(num_bits, 1)
    bits = torch.arange(num_bits)
    flipped[bits, bits // 8] ^= (1 << (bits % 8)).to(torch.uint8)
    found = {*digests(flipped.view(num_bits, *block.shape[1:])), *digests(block)}
    assert len(found) == num_bits + 1


@settings(max_examples=100, deadline=None)
@given(data=st.data(), fill=st.sampled_from(["random", "zeros", "nan"]))
def test_any_single_flipped_bit_is_found_in_any_content(data, fill):
    blocks = random_bytes(1, 2, 2, 4, 2, 64)
    if fill != "random":
        blocks.view(torch.float16).fill_(0 if fill == "zeros" else float("nan"))
    before = digests(blocks)
    blocks.view(-1)[data.draw(st.integers(0, blocks.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digests(blocks) != before


def test_keys_let_no_two_flips_in_one_row_cancel():
    """A flip of bit p < 32 of word j moves the row's sum by ±2**p key, one of p >= 32 by (±2**p ± 2**(p - 32)) key."""
    keys = row_keys(2048)
    low = np.uint64(1) << np.arange(32, dtype=np.uint64)
    high = low << np.uint64(32)
    moves = np.unique(np.concatenate([low, -low, high + low, high - low, -high + low, -high - low]))
    per_word = keys[:, None] * moves
    assert np.unique(per_word).size == per_word.size


@settings(max_examples=60, deadline=None)
@given(axis=st.integers(1, 4), data=st.data())
def test_swapped_rows_tokens_heads_planes_and_layers_are_found(axis, data):
    blocks = random_bytes(1, 3, 2, 4, 3, 16)
    size = blocks.shape[axis]
    i, j = data.draw(st.permutations(range(size)))[:2]
    order = list(range(size))
    order[i], order[j] = j, i
    assert digests(blocks) != digests(blocks.index_select(axis, torch.tensor(order)))


def test_rows_swapped_anywhere_are_found():
    block = random_bytes(1, 2, 2, 3, 2, 16)
    rows = block.view(-1, 16)
    pairs = [(i, j) for i in range(rows.shape[0]) for j in range(i)]
    swapped = rows.repeat(len(pairs), 1, 1)
    for k, (i, j) in enumerate(pairs):
        swapped[k, [i, j]] = swapped[k, [j, i]]
    assert len({*digests(swapped.view(len(pairs), *block.shape[1:])), *digests(block)}) == len(pairs) + 1


def test_swapped_blocks_are_found_by_their_seeds():
    blocks, seeds = random_bytes(2, 1, 2, 4, 2, 16), np.array([11, 12], dtype=np.uint64)
    first, second = digests(blocks, seeds)
    assert [first, second] != digests(blocks.flip(0), seeds)
    assert first != digests(blocks, seeds[::-1].copy())[0]
    same = blocks[:1].repeat(2, 1, 1, 1, 1, 1)
    assert len(set(digests(same, seeds))) == 2 and len(set(digests(same))) == 1


def test_equal_bytes_of_another_shape_have_another_digest():
    blocks = torch.zeros(1, 2, 2, 4, 2, 16, dtype=torch.uint8)
    shapes = [(2, 2, 4, 2, 16), (4, 1, 4, 2, 16), (2, 2, 2, 4, 16), (2, 2, 4, 1, 32), (2, 2, 4, 4, 8)]
    assert len({digests(blocks.view(1, *shape))[0] for shape in shapes}) == len(shapes)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([(1, 1), (1, 2), (4, 1), (2, 4)]),
    row_bytes=st.sampled_from([1, 6, 8, 20, 64]),
    ids=st.lists(st.integers(0, 3), max_size=4, unique=True),
)
def test_copy_and_digest_are_those_of_the_two_alone(groups, row_bytes, ids):
    shape = {"num_layers": 2, "num_tokens": 3, "num_heads": 4, "row_bytes": row_bytes}
    memory = [random_bytes(4, 2 * 2 * 3 * 4 * row_bytes + 16) for _ in range(2)]
    src, dst = (stored(m, head_groups=g, **shape) for m, g in zip(memory, groups, strict=True))
    src_ids, dst_ids = np.array(ids, dtype=np.int64), np.array(ids[::-1], dtype=np.int64)
    seeds, out = np.arange(len(ids), dtype=np.uint64), torch.zeros(len(ids), dtype=torch.uint64)
    before = memory[1].clone()
    copy_blocks_digest(src, src_ids, dst, dst_ids, out, seeds=seeds)
    assert torch.equal(out, digest_blocks_new(src, src_ids, seeds))
    assert torch.equal(out, digest_blocks_new(dst, dst_ids, seeds))
    untouched = [b for b in range(4) if b not in ids]
    assert torch.equal(memory[1][untouched], before[untouched]) and torch.equal(memory[1][:, -16:], before[:, -16:])


def test_memory_stays_small_whatever_the_payload():
    blocks = torch.zeros(8, 4, 2, 64, 8, 256, dtype=torch.uint8)  # 8 MiB
    view, out = from_paged(blocks, AXES), torch.zeros(8, dtype=torch.uint64)
    digest_blocks(view, np.arange(8), out)
    tracemalloc.start()
    digest_blocks(view, np.arange(8), out)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_blocks_larger_than_a_chunk_are_cut():
    blocks = random_bytes(2, 1, 1, 700, 3, 200)
    assert digests(blocks) == digest_reference(blocks, [0, 0])


def test_int64_output_holds_the_same_bits_and_empty_lists_do_nothing():
    view = from_paged(random_bytes(3, 1, 2, 4, 2, 16), AXES)
    out = torch.zeros(3, dtype=torch.int64)
    digest_blocks(view, np.arange(3), out)
    assert torch.equal(out, digest_blocks_new(view, np.arange(3)).view(torch.int64))
    assert digest_blocks_new(view, np.zeros(0, dtype=np.int64)).shape == (0,)


def test_arguments_that_do_not_fit_are_refused():
    view = from_paged(random_bytes(3, 1, 2, 4, 2, 16), AXES)
    ids = np.arange(3)
    with pytest.raises(KernelArgumentError, match="holds 3"):
        digest_blocks_new(view, ids + 1)
    with pytest.raises(KernelArgumentError, match="out must be"):
        digest_blocks(view, ids, torch.zeros(2, dtype=torch.uint64))
    with pytest.raises(KernelArgumentError, match="out must be"):
        digest_blocks(view, ids, torch.zeros(3, dtype=torch.int32))
    for seeds in (np.zeros(2, dtype=np.uint64), np.zeros(3, dtype=np.int64), [1, 2, 3]):
        with pytest.raises(KernelArgumentError, match="seeds must be"):
            digest_blocks_new(view, ids, seeds)
    with pytest.raises(KernelArgumentError, match="ids must be a 1-D numpy int64 array, got list"):
        digest_blocks_new(view, [0, 1])
    with pytest.raises(KernelArgumentError, match="sm_budget"):
        digest_blocks(view, ids, torch.zeros(3, dtype=torch.uint64), sm_budget=0)


def test_copies_that_do_not_fit_are_refused_and_write_nothing():
    src = from_paged(random_bytes(3, 1, 2, 4, 2, 16), AXES)
    memory = torch.full((3, 1, 2, 4, 2, 16), 0xAA, dtype=torch.uint8)
    dst, out, ids = from_paged(memory, AXES), torch.zeros(3, dtype=torch.uint64), np.arange(3)
    with pytest.raises(KernelArgumentError, match="in dst"):
        copy_blocks_digest(src, ids, dst.slice_heads(0, 1), ids, out)
    with pytest.raises(KernelArgumentError, match="more than once"):
        copy_blocks_digest(src, ids, dst, np.array([0, 1, 0]), out)
    with pytest.raises(KernelArgumentError, match="both read and written"):
        copy_blocks_digest(dst, ids, dst, ids, out)
    with pytest.raises(KernelArgumentError, match="out must be"):
        copy_blocks_digest(src, ids, dst, ids, out[:2])
    assert (memory == 0xAA).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("row_bytes", [1, 6, 20, 64, 256, 1152])
@pytest.mark.parametrize("axes", ["BLPTHD", "BLPHTD"])
def test_gpu_gives_the_digests_of_the_cpu_and_copies(row_bytes, axes):
    blocks, seeds, ids = random_bytes(5, 2, 2, 33, 3, row_bytes), np.arange(4, dtype=np.uint64), np.array([4, 0, 2, 1])
    moved = torch.full([blocks.shape[AXES.index(a)] for a in axes], 0xAA, dtype=torch.uint8, device="cuda")
    out = torch.empty(4, dtype=torch.uint64, device="cuda")
    view, expected = from_paged(blocks.cuda(), AXES), digest_blocks_new(from_paged(blocks, AXES), ids, seeds)
    assert torch.equal(digest_blocks_new(view, ids, seeds).cpu(), expected)
    copy_blocks_digest(view, ids, from_paged(moved, axes), np.arange(4), out, seeds=seeds)
    assert torch.equal(out.cpu(), expected)
    back = moved.cpu().permute(*(axes.index(a) for a in AXES))
    assert torch.equal(back[:4], blocks[ids]) and (back[4] == 0xAA).all()


@pytest.mark.parametrize("bit", [0, 16, 31])
def test_flips_in_upper_bits_reach_fewer_bits_of_a_sum(bit):
    keys = row_keys(256)
    words = torch.randint(-(2**62), 2**62, (keys.size,)).numpy().view(np.uint64)
    flips = words * keys & np.uint64((2**32 - 2**bit) * (2**32 + 1))  # of random bits from `bit` upwards in both halves
    sums = [int(((w ^ (w >> np.uint64(32))) * keys).sum(dtype=np.uint64)) for w in (words, words ^ flips)]
    assert flips.any() and (sums[0] - sums[1]) % 2**bit == 0 and sums[0] != sums[1]
