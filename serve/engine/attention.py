"""Writes keys and values into cache blocks and attends over block tables: in plain torch, or with the paged kernels."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dynamo.kernels.paged_attention import paged_decode, paged_prefill, paged_write
from dynamo.serve.engine.batch import ForwardBatch, PagedTables, SequenceSlice

__all__ = ["AttentionPlan", "PagedAttentionPlan", "plan_attention"]

QUERY_TILE = 256
"""Most queries of a chunk attended at once: bounds the mask at QUERY_TILE x context and skips keys after the tile."""

MIN_GROUP_TOKENS = 128
"""Decodes shorter than this share a group whatever their ratio: their padding costs less than another call."""


CPU_GATHER_BYTES = 1 << 20
"""Most bytes of keys a group of decodes gathers on the CPU: what is gathered should still be in L2 when it is attended
(16 sequences of 1,024 tokens: half the time of gathering them all at once)."""


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries [start, stop) of the flat batch that attend the first `num_keys` tokens of their sequence."""

    start: int
    stop: int
    num_keys: int


@dataclass(frozen=True, slots=True)
class _Prefill:
    """A chunk of several tokens. `block_table` is None when it starts its sequence and needs only its own keys."""

    start: int
    stop: int
    block_table: Tensor | None
    tiles: tuple[_Tile, ...]


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    """Sequences with one query each, padded to the longest.

    Attributes:
        rows: their places in the flat batch; a slice when they are adjacent.
        block_tables: int64 [num_sequences * num_blocks].
        num_keys: keys attended per sequence, padding included.
        mask: [num_sequences, 1, 1, num_keys], 0 or -inf; None when all sequences have exactly `num_keys` tokens.
        unwritten: int64 rows of the gathered [num_sequences * num_blocks * block_size] keys that hold no token. They
            are zeroed: masked as they are, an old NaN there would still reach the sums.
    """

    rows: slice | Tensor
    num_sequences: int
    block_tables: Tensor
    num_keys: int
    mask: Tensor | None
    unwritten: Tensor | None


class AttentionPlan:
    """Indices and masks of one forward pass, computed once and used by every layer.

    Decodes are grouped by length so that padding at most doubles the keys read; a group costs one gather and one
    attention call per layer however many sequences it has.

    Args:
        k_cache: any layer's keys, for their shape, dtype and device.
    """

    def __init__(self, batch: ForwardBatch, k_cache: Tensor) -> None:
        self._slot_blocks, self._slot_offsets = batch.slot_blocks, batch.slot_offsets
        self._block_size = k_cache.shape[1]
        self._dtype = k_cache.dtype
        self._device = k_cache.device
        token_bytes = k_cache.shape[2] * k_cache.shape[3] * k_cache.itemsize
        self._max_group_tokens = CPU_GATHER_BYTES // token_bytes if self._device.type == "cpu" else None
        decodes = [sequence for sequence in batch.sequences if sequence.query_len == 1]
        self._prefills = [self._plan_prefill(sequence) for sequence in batch.sequences if sequence.query_len > 1]
        self._groups = [self._plan_group(group) for group in self._group_by_length(decodes)]
        self._causal_mask = self._plan_causal_mask()

    def write(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """Stores k and v, [num_tokens, num_kv_heads, head_dim], in a layer's cache [num_blocks, block_size, ...]."""
        k_cache.index_put_((self._slot_blocks, self._slot_offsets), k)
        v_cache.index_put_((self._slot_blocks, self._slot_offsets), v)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """Causal attention of every token over its sequence, after `write`.

        Args:
            q: [num_tokens, num_heads, head_dim], rotated.
            k: [num_tokens, num_kv_heads, head_dim], rotated.
            v: like k.
            k_cache: [num_blocks, block_size, num_kv_heads, head_dim], possibly strided.
            v_cache: like k_cache.

        Returns:
            [num_tokens, num_heads * head_dim].
        """
        if not self._prefills and len(self._groups) == 1 and isinstance(self._groups[0].rows, slice):
            return self._attend_group(self._groups[0], q, k_cache, v_cache)
        out = torch.empty(q.shape[0], q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
        for group in self._groups:
            out[group.rows] = self._attend_group(group, q[group.rows], k_cache, v_cache)
        for prefill in self._prefills:
            if prefill.block_table is None:
                keys, values = k[prefill.start : prefill.stop], v[prefill.start : prefill.stop]
            else:
                keys = k_cache.index_select(0, prefill.block_table).flatten(0, 1)
                values = v_cache.index_select(0, prefill.block_table).flatten(0, 1)
            for tile in prefill.tiles:
                out[tile.start : tile.stop] = self._attend_tile(tile, q, keys, values)
        return out

    def _attend_group(self, group: _DecodeGroup, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        num_kv_heads, head_dim = k_cache.shape[2], k_cache.shape[3]
        keys, values = (
            cache.index_select(0, group.block_tables).view(-1, num_kv_heads, head_dim) for cache in (k_cache, v_cache)
        )
        if group.unwritten is not None:
            keys.index_fill_(0, group.unwritten, 0)
            values.index_fill_(0, group.unwritten, 0)
        keys, values = (
            gathered.view(group.num_sequences, -1, num_kv_heads, head_dim)[:, : group.num_keys].transpose(1, 2)
            for gathered in (keys, values)
        )
        # The query heads that share a key head take the place of query positions: no key is repeated.
        queries = q.view(group.num_sequences, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=group.mask)
        return out.reshape(group.num_sequences, -1)

    def _attend_tile(self, tile: _Tile, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        num_queries, (num_kv_heads, head_dim) = tile.stop - tile.start, keys.shape[1:]
        # [num_kv_heads, group, ...] with keys expanded over the group: no key is repeated, whichever kernel runs.
        queries = q[tile.start : tile.stop].view(num_queries, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        shape = (num_kv_heads, queries.shape[1], tile.num_keys, head_dim)
        keys, values = (x[: tile.num_keys].transpose(0, 1).unsqueeze(1).expand(shape) for x in (keys, values))
        if tile.num_keys == num_queries:
            out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        else:
            # The mask's lower right corner is the diagonal, so smaller ones are its lower right parts.
            mask = self._causal_mask[-num_queries:, -tile.num_keys :]
            # Kernels of CUDA devices read masks 16 bytes at a time and do not look where one begins.
            if self._device.type == "cuda":
                mask = mask.clone(memory_format=torch.contiguous_format)
            out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return out.permute(2, 0, 1, 3).reshape(num_queries, -1)

    def _plan_prefill(self, sequence: SequenceSlice) -> _Prefill:
        start, stop = sequence.query_start, sequence.query_start + sequence.query_len
        num_past = sequence.context_len - sequence.query_len
        if num_past == 0:
            return _Prefill(start, stop, None, (_Tile(start, stop, sequence.query_len),))
        tiles = []
        for tile_start in range(start, stop, QUERY_TILE):
            tile_stop = min(tile_start + QUERY_TILE, stop)
            tiles.append(_Tile(tile_start, tile_stop, num_past + tile_stop - start))
        return _Prefill(start, stop, self._used_blocks(sequence), tuple(tiles))

    def _plan_causal_mask(self) -> Tensor:
        tiles = [tile for prefill in self._prefills if prefill.block_table is not None for tile in prefill.tiles]
        num_queries = max((tile.stop - tile.start for tile in tiles), default=0)
        num_keys = max((tile.num_keys for tile in tiles), default=0)
        mask = torch.full((num_queries, num_keys), -torch.inf, dtype=self._dtype, device=self._device)
        return mask.triu_(num_keys - num_queries + 1)

    def _group_by_length(self, decodes: list[SequenceSlice]) -> list[list[SequenceSlice]]:
        """Splits decodes so that in each group the longest is at most twice as long as the shortest, tiny ones apart."""
        lengths = [sequence.context_len for sequence in decodes]
        limit = self._max_group_tokens
        if decodes and max(lengths) > 2 * max(min(lengths), MIN_GROUP_TOKENS):
            decodes = sorted(decodes, key=lambda s: -s.context_len)
        groups: list[list[SequenceSlice]] = []
        longest = 0
        for sequence in decodes:
            padded = max(longest, sequence.context_len)
            if (
                groups
                and longest <= 2 * max(sequence.context_len, MIN_GROUP_TOKENS)
                and (limit is None or padded * (len(groups[-1]) + 1) <= limit)
            ):
                groups[-1].append(sequence)
                longest = padded
            else:
                groups.append([sequence])
                longest = sequence.context_len
        return groups

    def _plan_group(self, group: list[SequenceSlice]) -> _DecodeGroup:
        first = group[0].query_start
        rows: slice | Tensor = slice(first, first + len(group))
        if any(sequence.query_start != first + i for i, sequence in enumerate(group)):
            rows = torch.tensor([sequence.query_start for sequence in group], device=self._device)
        lengths = [sequence.context_len for sequence in group]
        num_keys = max(lengths)
        tables = [self._used_blocks(sequence) for sequence in group]
        if min(lengths) == num_keys:
            return _DecodeGroup(rows, len(group), torch.cat(tables), num_keys, None, None)
        padded = pad_sequence(tables, batch_first=True)
        unused = torch.arange(padded.shape[1] * self._block_size)[None, :] >= torch.tensor(lengths)[:, None]
        unwritten = unused.flatten().nonzero().squeeze(1).to(self._device)
        mask = torch.zeros(len(group), num_keys, dtype=self._dtype)
        mask.masked_fill_(unused[:, :num_keys], -torch.inf)
        mask = mask[:, None, None, :].to(self._device)
        return _DecodeGroup(rows, len(group), padded.flatten(), num_keys, mask, unwritten)

    def _num_blocks(self, sequence: SequenceSlice) -> int:
        return -(-sequence.context_len // self._block_size)

    def _used_blocks(self, sequence: SequenceSlice) -> Tensor:
        return sequence.block_table[: self._num_blocks(sequence)]


class PagedAttentionPlan:
    """The same over `ForwardBatch.paged`: nothing is gathered, and nothing depends on what lies on the device."""

    def __init__(self, batch: ForwardBatch, tables: PagedTables) -> None:
        self._batch, self._tables = batch, tables

    def write(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """See `AttentionPlan.write`; padding is not stored."""
        paged_write(k, v, k_cache, v_cache, self._batch.slot_blocks, self._batch.slot_offsets)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """See `AttentionPlan.attend`; padding gives zeros."""
        tables = self._tables
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        scale = q.shape[2] ** -0.5
        first = tables.num_decodes
        if first:
            paged_decode(
                q[:first],
                k_cache,
                v_cache,
                tables.block_tables[:first],
                tables.context_lens[:first],
                scale=scale,
                out=out[:first],
                workspace=tables.workspace,
                num_splits=tables.num_splits,
            )
        if tables.max_query_len:
            paged_prefill(
                q[first:],
                k_cache,
                v_cache,
                tables.block_tables[first:],
                tables.context_lens[first:],
                tables.query_starts,
                max_query_len=tables.max_query_len,
                scale=scale,
                out=out[first:],
            )
        return out.flatten(1)


def plan_attention(batch: ForwardBatch, k_cache: Tensor) -> AttentionPlan | PagedAttentionPlan:
    """The plan for a batch; `k_cache` as in `AttentionPlan`."""
    return AttentionPlan(batch, k_cache) if batch.paged is None else PagedAttentionPlan(batch, batch.paged)
