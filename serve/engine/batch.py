"""One step's work for the model: flat tokens of many sequences and where their keys and values live."""

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ForwardBatch", "SequenceSlice"]


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
class ForwardBatch:
    """Everything one forward pass needs besides weights and cache. All tensors are int64 on the model's device.

    Attributes:
        token_ids: [num_tokens].
        positions: [num_tokens], each token's index in its sequence.
        slot_blocks: [num_tokens], the pool slot each token's key and value are written to.
        slot_offsets: [num_tokens], the token's place in that slot.
        sequences: slices that together cover all tokens, in order and without overlap.
        logit_rows: [num_selected], flat token indices whose logits are wanted.
    """

    token_ids: Tensor
    positions: Tensor
    slot_blocks: Tensor
    slot_offsets: Tensor
    sequences: tuple[SequenceSlice, ...]
    logit_rows: Tensor
