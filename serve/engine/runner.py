"""Executes scheduled steps: the seam between the scheduler and whatever turns tokens into the next ones."""

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynamo.serve.engine.batch import ForwardBatch, SequenceSlice, logit_rows, step_tables
from dynamo.serve.engine.model import CausalLM
from dynamo.serve.engine.paged_steps import PagedSteps
from dynamo.serve.engine.sampler import SampledToken, Sampler, SamplingState
from dynamo.serve.engine.scheduler import ScheduledStep
from dynamo.serve.engine.sequence import SequenceState
from dynamo.serve.engine.step_meter import StepMeter
from dynamo.serve.errors import RequestFailedError

__all__ = ["ModelRunner", "TorchRunner"]


class ModelRunner(Protocol):
    """Computes one step. Called on the engine's thread."""

    def execute(self, step: ScheduledStep) -> list[SampledToken | RequestFailedError]:
        """Writes the KV of the step's tokens and samples.

        Returns:
            One outcome per sequence of `step.sampling`, in its order; an error fails that request alone.

        Raises:
            Exception: anything; the requests of the step are failed.
        """
        ...


class TorchRunner:
    """Runs a `CausalLM` over the cache's layers.

    Owns reusable host buffers for `max_batch_tokens` tokens, pinned for CUDA. They are free again when `execute`
    returns, since sampling waits for the device.

    Args:
        kv: `KVCache.layer`.
        device: where the model is.
        paged: computes the steps with paged attention; None: plain torch does.
        meter: is told how long steps took; None: nobody wants to know.
    """

    def __init__(
        self,
        model: CausalLM,
        sampler: Sampler,
        kv: Callable[[int], tuple[Tensor, Tensor]],
        *,
        device: torch.device,
        block_size: int,
        max_batch_tokens: int,
        paged: PagedSteps | None = None,
        meter: StepMeter | None = None,
    ) -> None:
        self._model = model
        self._sampler = sampler
        self._kv = kv
        self._device = device
        self._block_size = block_size
        self._paged = paged
        self._meter = meter
        # Rows: token ids, positions, slot blocks, slot offsets.
        self._staging = torch.empty((4, max_batch_tokens), dtype=torch.int64, pin_memory=device.type == "cuda")

    def execute(self, step: ScheduledStep) -> list[SampledToken | RequestFailedError]:
        started_s = time.perf_counter()
        with torch.inference_mode():
            if self._paged is not None:
                logits = self._paged.logits(step)
            else:
                logits = self._model.forward(self._batch(step), self._kv)
            outcomes = self._sampler.sample(logits, [_sampling_state(sequence) for sequence in step.sampling])
        if self._meter is not None:
            self._meter.add(step, time.perf_counter() - started_s)
        return outcomes

    def _batch(self, step: ScheduledStep) -> ForwardBatch:
        work = [(sequence, 1) for sequence in step.decodes]
        work += [(chunk.sequence, chunk.num_tokens) for chunk in step.prefills]
        tables = step_tables(step)
        device_tables = torch.from_numpy(np.concatenate(tables).astype(np.int64)).to(self._device)
        slices = []
        start = table_start = 0
        for (sequence, num_tokens), table in zip(work, tables, strict=True):
            device_table = device_tables[table_start : table_start + len(table)]
            slices.append(SequenceSlice(start, num_tokens, sequence.num_computed + num_tokens, device_table))
            start += num_tokens
            table_start += len(table)
        self._stage(step, tables)
        staged = self._staging[:, :start].to(self._device, non_blocking=True)
        token_ids, positions, slot_blocks, slot_offsets = staged.unbind()
        return ForwardBatch(
            token_ids=token_ids,
            positions=positions,
            slot_blocks=slot_blocks,
            slot_offsets=slot_offsets,
            sequences=tuple(slices),
            logit_rows=torch.tensor(logit_rows(step), dtype=torch.int64, device=self._device),
        )

    def _stage(self, step: ScheduledStep, tables: list[npt.NDArray[np.int32]]) -> None:
        """Fills the host buffers; `tables` has one block table per decode, then one per chunk."""
        block_size = self._block_size
        token_ids, positions, slot_blocks, slot_offsets = self._staging.numpy()
        end = len(step.decodes)
        places = [sequence.num_computed for sequence in step.decodes]
        token_ids[:end] = [sequence.tokens[-1] for sequence in step.decodes]
        positions[:end] = places
        slot_blocks[:end] = [table[place // block_size] for table, place in zip(tables, places, strict=False)]
        for chunk, table in zip(step.prefills, tables[end:], strict=True):
            start, end = end, end + chunk.num_tokens
            first = chunk.sequence.num_computed
            token_ids[start:end] = chunk.sequence.tokens[first : first + chunk.num_tokens]
            positions[start:end] = np.arange(first, first + chunk.num_tokens)
            slot_blocks[start:end] = table[positions[start:end] // block_size]
        np.remainder(positions[:end], block_size, out=slot_offsets[:end])


def _sampling_state(sequence: SequenceState) -> SamplingState:
    if sequence.sampling is None:
        prompt = sequence.tokens[: sequence.num_prompt_tokens]
        sequence.sampling = SamplingState(sequence.params, prompt, sequence.output_tokens)
    return sequence.sampling
