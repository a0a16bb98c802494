"""Steps with paged attention: inputs at fixed addresses, decode steps replayed from CUDA graphs.

    packed int64 buffer   token ids | positions | slot blocks | slot offsets | context lengths | query starts | logit rows
    table int32 buffer    [max_running, max_blocks], row i for the step's i-th sequence

Both are filled in pinned host memory and copied to the device; packed ones always, tables only the rows that changed.
A decode step padded to n sequences has its parts at the same places each time, which is what a graph of n needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.kernels.paged_attention import choose_num_splits, decode_workspace_elements
from dynamo.serve.engine.batch import ForwardBatch, PagedTables, logit_rows, step_tables
from dynamo.serve.engine.cuda_graphs import CudaStepCapturer, DecodeGraphs, StepCapturer
from dynamo.serve.engine.model import CausalLM
from dynamo.serve.engine.scheduler import ScheduledStep

__all__ = ["PagedSteps"]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the layout of the packed buffer depends on."""

    num_tokens: int
    num_sequences: int
    num_chunks: int
    num_logits: int

    @property
    def num_numbers(self) -> int:
        return 4 * self.num_tokens + self.num_sequences + self.num_chunks + 1 + self.num_logits

    def split(self, packed: Tensor) -> Sequence[Tensor]:
        """Token ids, positions, slot blocks, slot offsets, context lengths, query starts, logit rows."""
        sizes = [self.num_tokens] * 4 + [self.num_sequences, self.num_chunks + 1, self.num_logits]
        return torch.split(packed[: self.num_numbers], sizes)


class PagedSteps:
    """Computes the logits of steps of one model over one cache.

    Owns the input buffers, the attention workspace and the graphs. Used by one thread; a step's logits are overwritten by
    the next.

    Args:
        kv: `KVCache.layer`; the tensors must stay where they are.
        max_running: most sequences of a step.
        max_batch_tokens: most tokens of a step.
        max_model_len: most tokens of a sequence.
        capturer: captures decode steps; None: with CUDA, a `CudaStepCapturer`, and none without.
        captures: whether decode steps are captured at all.
    """

    def __init__(
        self,
        model: CausalLM,
        kv: Callable[[int], tuple[Tensor, Tensor]],
        *,
        block_size: int,
        max_running: int,
        max_batch_tokens: int,
        max_model_len: int,
        capturer: StepCapturer | None = None,
        captures: bool = True,
    ) -> None:
        self._model = model
        self._kv = kv
        self._block_size = block_size
        self._max_model_len = max_model_len
        device = model.device
        is_cuda = device.type == "cuda"
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
        self._packed = _Mirror(4 * max_batch_tokens + 3 * max_running + 1, 1, torch.int64, device)
        self._tables = _Mirror(max_running, -(-max_model_len // block_size), torch.int32, device)
        config = model.config
        num_elements = max(
            decode_workspace_elements(n, config.num_heads, config.head_dim, self._num_splits(n))
            for n in range(1, max_running + 1)
        )
        self._workspace = torch.empty(num_elements, dtype=torch.float32, device=device)
        if capturer is None and captures and is_cuda:
            capturer = CudaStepCapturer(device)
        self._graphs = DecodeGraphs(self._decode, capturer, max_running=max_running) if capturer is not None else None

    @property
    def captured_sizes(self) -> tuple[int, ...]:
        """Padded batch sizes of the decode steps captured so far."""
        return self._graphs.captured_sizes if self._graphs is not None else ()

    def logits(self, step: ScheduledStep) -> Tensor:
        """Writes the KV of the step's tokens and returns float32 [len(step.sampling), vocab_size]."""
        num_decodes = len(step.decodes)
        if self._graphs is None or step.prefills:
            return self._model.forward(self._load(step, num_decodes), self._kv)
        size = self._graphs.size_for(num_decodes)
        self._load(step, size)
        return self._graphs.logits(size)[:num_decodes]

    def _decode(self, size: int) -> Tensor:
        shape = _Shape(size, size, 0, size)
        return self._model.forward(self._batch(shape, num_decodes=size, max_query_len=0), self._kv)

    def _load(self, step: ScheduledStep, num_decodes: int) -> ForwardBatch:
        """Fills the buffers; decodes are padded to `num_decodes`, with sequences of length 0 that write nothing."""
        tables = step_tables(step)
        num_padding = num_decodes - len(step.decodes)
        rows = logit_rows(step) + [len(step.decodes) + i for i in range(num_padding)]
        num_chunk_tokens = step.num_prefill_tokens
        shape = _Shape(num_decodes + num_chunk_tokens, num_decodes + len(step.prefills), len(step.prefills), len(rows))
        self._packed.await_copies()
        self._tables.await_copies()
        parts = [part.numpy() for part in shape.split(self._packed.host.view(-1))]
        self._stage(step, tables, parts)
        parts[6][:] = rows
        self._packed.copy(0, shape.num_numbers)
        changed = [i for i, table in enumerate(tables) if self._stage_table(i, table)]
        if changed:
            self._tables.copy(changed[0], changed[-1] + 1)
        longest = max((chunk.num_tokens for chunk in step.prefills), default=0)
        return self._batch(shape, num_decodes=num_decodes, max_query_len=longest)

    def _stage(
        self, step: ScheduledStep, tables: list[npt.NDArray[np.int32]], parts: list[npt.NDArray[np.int64]]
    ) -> None:
        token_ids, positions, slot_blocks, slot_offsets, context_lens, query_starts, _ = parts
        block_size = self._block_size
        num_decodes = len(step.decodes)
        first_chunk_token = len(token_ids) - step.num_prefill_tokens
        places = [sequence.num_computed for sequence in step.decodes]
        token_ids[:num_decodes] = [sequence.tokens[-1] for sequence in step.decodes]
        positions[:num_decodes] = places
        slot_blocks[:num_decodes] = [table[place // block_size] for table, place in zip(tables, places, strict=False)]
        context_lens[:num_decodes] = positions[:num_decodes] + 1
        padding = slice(num_decodes, first_chunk_token)
        token_ids[padding], positions[padding], slot_blocks[padding], context_lens[padding] = 0, 0, -1, 0
        query_starts[0] = 0
        end = first_chunk_token
        for i, (chunk, table) in enumerate(zip(step.prefills, tables[num_decodes:], strict=True)):
            start, end = end, end + chunk.num_tokens
            first = chunk.sequence.num_computed
            token_ids[start:end] = chunk.sequence.tokens[first : first + chunk.num_tokens]
            positions[start:end] = np.arange(first, first + chunk.num_tokens)
            slot_blocks[start:end] = table[positions[start:end] // block_size]
            context_lens[first_chunk_token + i] = first + chunk.num_tokens
            query_starts[i + 1] = end - first_chunk_token
        np.remainder(positions, block_size, out=slot_offsets)

    def _stage_table(self, row: int, table: npt.NDArray[np.int32]) -> bool:
        """Whether the row was not what it is now. Numbers past a sequence's length are never looked at."""
        held = self._tables.host[row].numpy()[: len(table)]
        if np.array_equal(held, table):
            return False
        held[:] = table
        return True

    def _batch(self, shape: _Shape, *, num_decodes: int, max_query_len: int) -> ForwardBatch:
        token_ids, positions, slot_blocks, slot_offsets, context_lens, query_starts, rows = shape.split(
            self._packed.device.view(-1)
        )
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_blocks=slot_blocks,
            slot_offsets=slot_offsets,
            sequences=(),
            logit_rows=rows,
            paged=PagedTables(
                num_decodes=num_decodes,
                block_tables=self._tables.device[: shape.num_sequences],
                context_lens=context_lens,
                query_starts=query_starts,
                max_query_len=max_query_len,
                max_context_len=self._max_model_len,
                num_splits=self._num_splits(num_decodes) if num_decodes else 1,
                workspace=self._workspace,
            ),
        )

    def _num_splits(self, num_decodes: int) -> int:
        return choose_num_splits(
            num_decodes, self._model.config.num_kv_heads, self._max_model_len, num_processors=self._num_processors
        )


class _Mirror:
    """A host buffer and its copy on the device; on the CPU they are the same memory.

    Attributes:
        host: [num_rows, row_len], pinned for CUDA.
        device: the same on the device.
    """

    def __init__(self, num_rows: int, row_len: int, dtype: torch.dtype, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.host = torch.zeros((num_rows, row_len), dtype=dtype, pin_memory=self._is_cuda)
        self.device = torch.zeros_like(self.host, device=device) if self._is_cuda else self.host
        self._copied = torch.cuda.Event() if self._is_cuda else None  # type: ignore[no-untyped-call]

    def await_copies(self) -> None:
        """Returns when the host buffer may be changed: usually at once, as the last step was sampled from."""
        if self._copied is not None:
            self._copied.synchronize()

    def copy(self, start: int, stop: int) -> None:
        """Copies rows [start, stop) in the order of the current stream."""
        if self._copied is not None:
            self.device[start:stop].copy_(self.host[start:stop], non_blocking=True)
            # Not the stream of the thread's current device.
            self._copied.record(torch.cuda.current_stream(self.device.device))
