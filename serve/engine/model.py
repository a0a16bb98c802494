"""Dense decoder-only transformers (Llama 2 and 3, Qwen2, Qwen3) over flat tokens and a paged cache."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamo.serve.engine.attention import plan_attention
from dynamo.serve.engine.batch import ForwardBatch
from dynamo.serve.engine.model_config import ModelConfig
from dynamo.serve.engine.rope import RotaryEmbedding, apply_rope

__all__ = ["CausalLM", "LayerWeights"]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's parameters; projections of one input are kept as one matrix, so that they are one product.

    Attributes:
        qkv: [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size].
        gate_up: [2 * intermediate_size, hidden_size], gate first.
        q_norm: [head_dim], where the model normalises queries; likewise k_norm.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class CausalLM:
    """A model's weights and its forward pass. Weights are uninitialised until a loader fills `checkpoint_views`.

    One thread at a time may call `forward`. Numerics follow transformers': norms in float32 and cast back, rotary
    tables computed in float32 and cast, logits in the weights' dtype and then widened.
    """

    def __init__(self, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.embed = self._empty(config.vocab_size, config.hidden_size)
        self.layers = [self._empty_layer() for _ in range(config.num_layers)]
        self.norm = self._empty(config.hidden_size)
        self.lm_head = self.embed if config.tie_word_embeddings else self._empty(config.vocab_size, config.hidden_size)
        self._rope = RotaryEmbedding(config.rope, config.head_dim, device=device, dtype=dtype)

    def forward(self, batch: ForwardBatch, kv: Callable[[int], tuple[Tensor, Tensor]]) -> Tensor:
        """Computes the batch, writing every token's keys and values into the cache.

        Args:
            kv: gives layer i's keys and values, each [num_blocks, block_size, num_kv_heads, head_dim], possibly strided.

        Returns:
            float32 [num_selected, vocab_size] on the model's device: logits of `batch.logit_rows`, in their order.
        """
        with torch.inference_mode():
            plan = plan_attention(batch, kv(0)[0])
            cos, sin = self._rope.at(batch.positions, batch.max_context_len)
            x = F.embedding(batch.token_ids, self.embed)
            last = len(self.layers) - 1
            for i, layer in enumerate(self.layers):
                k_cache, v_cache = kv(i)
                q, k, v = self._project(layer, x, cos, sin)
                plan.write(k, v, k_cache, v_cache)
                if i == last and batch.logit_rows.shape[0] == 0:
                    return torch.empty(0, self.config.vocab_size, device=self.device)
                attended = plan.attend(q, k, v, k_cache, v_cache)
                if i == last:  # the rest of the last layer matters only to the rows asked for
                    x, attended = x.index_select(0, batch.logit_rows), attended.index_select(0, batch.logit_rows)
                x = x + F.linear(attended, layer.o, layer.o_bias)
                x = x + self._mlp(layer, x)
            return F.linear(self._rms_norm(x, self.norm), self.lm_head).float()

    def checkpoint_views(self) -> Iterator[tuple[str, Tensor]]:
        """Yields each Hugging Face parameter name with the tensor to copy it into, a view where weights are merged.

        `lm_head.weight` is absent when embeddings are tied.
        """
        config = self.config
        yield "model.embed_tokens.weight", self.embed
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for i, layer in enumerate(self.layers):
            merged: list[tuple[str, Tensor | None, tuple[str, ...], list[int]]] = [
                (
                    "self_attn",
                    layer.qkv,
                    ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
                    [q_rows, kv_rows, kv_rows],
                ),
                (
                    "self_attn",
                    layer.qkv_bias,
                    ("q_proj.bias", "k_proj.bias", "v_proj.bias"),
                    [q_rows, kv_rows, kv_rows],
                ),
                ("mlp", layer.gate_up, ("gate_proj.weight", "up_proj.weight"), [config.intermediate_size] * 2),
                ("mlp", layer.gate_up_bias, ("gate_proj.bias", "up_proj.bias"), [config.intermediate_size] * 2),
            ]
            for module, tensor, names, rows in merged:
                if tensor is not None:
                    for name, part in zip(names, torch.split(tensor, rows), strict=True):
                        yield f"model.layers.{i}.{module}.{name}", part
            single = {
                "input_layernorm.weight": layer.input_norm,
                "self_attn.q_norm.weight": layer.q_norm,
                "self_attn.k_norm.weight": layer.k_norm,
                "self_attn.o_proj.weight": layer.o,
                "self_attn.o_proj.bias": layer.o_bias,
                "post_attention_layernorm.weight": layer.post_norm,
                "mlp.down_proj.weight": layer.down,
                "mlp.down_proj.bias": layer.down_bias,
            }
            for name, whole in single.items():
                if whole is not None:
                    yield f"model.layers.{i}.{name}", whole
        yield "model.norm.weight", self.norm
        if not config.tie_word_embeddings:
            yield "lm_head.weight", self.lm_head

    def _project(self, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [num_tokens, heads, head_dim]."""
        config = self.config
        merged = F.linear(self._rms_norm(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        heads = merged.view(x.shape[0], -1, config.head_dim)
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = heads[:, :num_rotated]
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._rms_norm(heads[:, : config.num_heads], layer.q_norm)
            k = self._rms_norm(heads[:, config.num_heads : num_rotated], layer.k_norm)
            rotated = torch.cat((q, k), dim=1)
        rotated = apply_rope(rotated, cos, sin)
        return rotated[:, : config.num_heads], rotated[:, config.num_heads :], heads[:, num_rotated:]

    def _mlp(self, layer: LayerWeights, x: Tensor) -> Tensor:
        merged = F.linear(self._rms_norm(x, layer.post_norm), layer.gate_up, layer.gate_up_bias)
        gate, up = merged.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Root-mean-square norm over the last dimension, rounded to the dtype before the weight as transformers does."""
        eps = self.config.rms_norm_eps
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _empty_layer(self) -> LayerWeights:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        return LayerWeights(
            input_norm=self._empty(hidden),
            qkv=self._empty(q_rows + 2 * kv_rows, hidden),
            qkv_bias=self._empty(q_rows + 2 * kv_rows) if config.qkv_bias else None,
            q_norm=self._empty(config.head_dim) if config.qk_norm else None,
            k_norm=self._empty(config.head_dim) if config.qk_norm else None,
            o=self._empty(hidden, q_rows),
            o_bias=self._empty(hidden) if config.o_bias else None,
            post_norm=self._empty(hidden),
            gate_up=self._empty(2 * inner, hidden),
            gate_up_bias=self._empty(2 * inner) if config.mlp_bias else None,
            down=self._empty(hidden, inner),
            down_bias=self._empty(hidden) if config.mlp_bias else None,
        )
