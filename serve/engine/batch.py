"""One step's work for the model: flat tokens of many sequences and where their keys and values live."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dynamo.serve.engine.scheduler import ScheduledStep
from dynamo.serve.engine.sequence import SequenceState

__all__ = ["ForwardBatch", "PagedTables", "SequenceSlice", "logit_rows", "step_tables"]


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The tokens of one sequence that a step computes.

    Attributes:
        query_start: index of its first token in the batch's flat tensors.
        query_len: how many tokens of it the step computes, at least 1.
        context_len: tokens it has in the cache once these are written, so `context_len - query_len` came before.
        block_table: int64 [num_blocks], its slots in the device pool in order; at least enough for `context_len` tokens.
    """

    query_start: int
    query_len: int
    context_len: int
    block_table: Tensor


@dataclass(frozen=True, slots=True)
class PagedTables:
    """What paged attention reads of a batch's sequences: decodes, one flat token each, then chunks of prompts.

    Attributes:
        num_decodes: sequences with one token, and flat tokens before the chunks'; padding included.
        block_tables: int32 [num_sequences, max_blocks].
        context_lens: int64 [num_sequences], tokens in the cache once these are written; 0 for padding.
        query_starts: int64 [num_chunks + 1], each chunk's first token, counted from the first chunk's.
        max_query_len: tokens of the longest chunk.
        max_context_len: no sequence is longer.
        num_splits: of `dynamo.kernels.paged_attention.paged_decode`; likewise the workspace.
    """

    num_decodes: int
    block_tables: Tensor
    context_lens: Tensor
    query_starts: Tensor
    max_query_len: int
    max_context_len: int
    num_splits: int
    workspace: Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Everything one forward pass needs besides weights and cache. All tensors are int64 on the model's device.

    Attributes:
        token_ids: [num_tokens].
        positions: [num_tokens], each token's index in its sequence.
        slot_blocks: [num_tokens], the pool slot each token's key and value are written to; -1 for padding, if `paged`.
        slot_offsets: [num_tokens], the token's place in that slot.
        sequences: slices that together cover all tokens, in order and without overlap; empty if `paged`.
        logit_rows: [num_selected], flat token indices whose logits are wanted.
        paged: takes the place of `sequences` where attention is paged.
    """

    token_ids: Tensor
    positions: Tensor
    slot_blocks: Tensor
    slot_offsets: Tensor
    sequences: tuple[SequenceSlice, ...]
    logit_rows: Tensor
    paged: PagedTables | None = None

    @property
    def max_context_len(self) -> int:
        """Bounds the positions."""
        if self.paged is not None:
            return self.paged.max_context_len
        return max(sequence.context_len for sequence in self.sequences)


def step_tables(step: ScheduledStep) -> list[npt.NDArray[np.int32]]:
    """Slots in the device pool, in batch order: one table per decode, then one per chunk."""
    return [_block_table(sequence) for sequence in (*step.decodes, *(chunk.sequence for chunk in step.prefills))]


def logit_rows(step: ScheduledStep) -> list[int]:
    """Flat tokens after which a token is sampled: all decodes, and the last of a prompt's last chunk."""
    rows = list(range(len(step.decodes)))
    end = len(rows)
    for chunk in step.prefills:
        end += chunk.num_tokens
        if chunk.is_last:
            rows.append(end - 1)
    return rows


def _block_table(sequence: SequenceState) -> npt.NDArray[np.int32]:
    assert sequence.kv is not None, f"{sequence.request_id} holds no blocks"
    return sequence.kv.block_table
