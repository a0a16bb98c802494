"""Rotary position embeddings: tables of cosines and sines, and their application to queries and keys."""

import math

import torch
from torch import Tensor

from dynamo.serve.engine.model_config import RopeConfig

__all__ = ["RotaryEmbedding", "apply_rope", "inverse_frequencies"]

INITIAL_TABLE_LEN = 2048


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """Returns float32 [head_dim / 2] on the CPU: radians per position of each pair of dimensions, scaling included."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inverse = 1.0 / (config.theta**exponents)
    if config.rope_type == "linear":
        return inverse / config.factor
    if config.rope_type != "llama3":
        return inverse
    # Long waves are stretched by `factor`, short ones kept, those between are interpolated (Llama 3.1 report, 2024).
    original_len = config.original_max_position_embeddings
    wave_len = 2 * math.pi / inverse
    span = config.high_freq_factor - config.low_freq_factor
    keep = (original_len / wave_len - config.low_freq_factor) / span
    between = (1 - keep) * inverse / config.factor + keep * inverse
    stretched = torch.where(wave_len > original_len / config.low_freq_factor, inverse / config.factor, inverse)
    is_between = (wave_len >= original_len / config.high_freq_factor) & (
        wave_len <= original_len / config.low_freq_factor
    )
    return torch.where(is_between, between, stretched)


class RotaryEmbedding:
    """Cosine and sine tables by position, grown by doubling up to the longest position seen.

    Angles, cosines and sines are computed in float32 and then cast to the activations' dtype. The first half of the
    sines is negated, so that rotating needs no negation of the activations. Not thread-safe.
    """

    def __init__(self, config: RopeConfig, head_dim: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self._inverse = inverse_frequencies(config, head_dim).to(device)
        self._dtype = dtype
        self._cos, self._sin = self._tables(INITIAL_TABLE_LEN)

    def at(self, positions: Tensor, num_positions: int) -> tuple[Tensor, Tensor]:
        """Looks up positions.

        Args:
            positions: int64 [num_tokens], each below `num_positions`.
            num_positions: bounds the positions on the host, so that growing needs no device round trip.

        Returns:
            Cosines and signed sines, each [num_tokens, 1, head_dim].
        """
        if num_positions > self._cos.shape[0]:
            self._cos, self._sin = self._tables(1 << (num_positions - 1).bit_length())
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def _tables(self, length: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(length, dtype=torch.float32, device=self._inverse.device)
        angles = positions[:, None, None] * self._inverse
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1).to(self._dtype), torch.cat((-sin, sin), -1).to(self._dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x: [num_tokens, num_heads, head_dim] in the half-split form of Hugging Face checkpoints.

    Args:
        cos: [num_tokens, 1, head_dim].
        sin: the same shape, its first half negated.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin
