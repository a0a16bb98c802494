"""What a Hugging Face config.json says about a dense decoder, checked and in our words. This module loads no torch."""

from dataclasses import dataclass
from typing import Any

from dynamo.serve.engine.dtypes import FLOAT_DTYPES
from dynamo.serve.errors import ModelLoadError

__all__ = ["SUPPORTED_ARCHITECTURES", "ModelConfig", "RopeConfig", "TextLimits", "token_ids"]

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. The four llama3 numbers mean nothing to the other types; `factor` is 1 for default."""

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and flags of a model.

    Attributes:
        max_position_embeddings: longest sequence, in tokens, the positions are meant for, rope scaling included.
        dtype: what the checkpoint says its weights are, by name; None when it says nothing.
        eos_token_ids: as config.json has them; generation_config.json overrides them.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeConfig
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any], source: str) -> "ModelConfig":
        """Reads the parsed config.json of transformers 4 or 5.

        Args:
            source: the file's path, for messages.

        Raises:
            ModelLoadError: an architecture, feature or value that this engine does not serve.
        """
        fields = _Fields(raw, source)
        architecture = _architecture(fields)
        _refuse_unsupported(fields, architecture)
        num_heads = fields.positive("num_attention_heads")
        num_kv_heads = fields.positive("num_key_value_heads", num_heads)
        hidden_size = fields.positive("hidden_size")
        if num_heads % num_kv_heads:
            raise fields.error("num_key_value_heads", f"does not divide num_attention_heads={num_heads}")
        derived_head_dim = (
            128 if architecture == "Qwen3ForCausalLM" and "head_dim" not in raw else hidden_size // num_heads
        )
        head_dim = fields.positive("head_dim", derived_head_dim)
        if head_dim % 2:
            raise fields.error("head_dim", "is odd; rotary embeddings need an even one")
        attention_bias = fields.flag("attention_bias")
        rope = _rope(fields)
        limits = TextLimits.from_json(raw, source)
        return cls(
            architecture=architecture,
            vocab_size=limits.vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.positive("intermediate_size"),
            num_layers=fields.positive("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            max_position_embeddings=limits.max_position_embeddings,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=architecture == "Qwen2ForCausalLM" or attention_bias,
            o_bias=architecture != "Qwen2ForCausalLM" and attention_bias,
            mlp_bias=architecture == "LlamaForCausalLM" and fields.flag("mlp_bias"),
            qk_norm=architecture == "Qwen3ForCausalLM",
            rope=rope,
            dtype=_dtype(fields),
            eos_token_ids=limits.eos_token_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLimits:
    """What matters to whoever reads and writes a model's tokens and leaves the arithmetic to others, of any architecture.

    Attributes:
        max_position_embeddings: see `ModelConfig`.
        eos_token_ids: see `ModelConfig`.
    """

    vocab_size: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_json(cls, raw: dict[str, Any], source: str) -> "TextLimits":
        """Reads the parsed config.json of transformers 4 or 5; models of more than text keep theirs in `text_config`.

        Args:
            source: the file's path, for messages.

        Raises:
            ModelLoadError: a value is missing or makes no sense.
        """
        inner = raw.get("text_config")
        fields = _Fields(inner if isinstance(inner, dict) else raw, source)
        max_positions = fields.positive("max_position_embeddings")
        scaling = _rope_scaling(fields)
        return cls(
            vocab_size=fields.positive("vocab_size"),
            max_position_embeddings=(
                int(max_positions * scaling.number("factor")) if scaling.rope_type == "linear" else max_positions
            ),
            eos_token_ids=token_ids(raw.get("eos_token_id", fields.raw.get("eos_token_id"))),
        )


def token_ids(value: object) -> tuple[int, ...]:
    """Token ids from a JSON field that holds nothing, one id or a list of ids."""
    candidates = value if isinstance(value, list) else [value]
    return tuple(item for item in candidates if isinstance(item, int) and not isinstance(item, bool))


@dataclass(frozen=True, slots=True)
class _Fields:
    """Typed access to one JSON object; null counts as absent."""

    raw: dict[str, Any]
    source: str

    @property
    def rope_type(self) -> object:
        """Of an object with rotary settings."""
        return self.raw.get("rope_type", self.raw.get("type")) or "default"

    def error(self, key: str, problem: str) -> ModelLoadError:
        return ModelLoadError(f"{self.source}: {key}={self.raw.get(key)!r} {problem}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key)
        if value is None:
            if default is None:
                raise ModelLoadError(f"{self.source}: {key} is missing; the file is not a complete model configuration")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(key, "is not a positive number")
        return float(value)

    def positive(self, key: str, default: int | None = None) -> int:
        number = self.number(key, default)
        if number != int(number):
            raise self.error(key, "is not a whole number")
        return int(number)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "is not true or false")
        return bool(value)


def _architecture(fields: _Fields) -> str:
    named = fields.raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise fields.error("architectures", f"is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}")
    return str(architecture)


def _refuse_unsupported(fields: _Fields, architecture: str) -> None:
    raw = fields.raw
    if raw.get("quantization_config"):
        raise ModelLoadError(
            f"{fields.source}: quantization_config is present, but quantised checkpoints are not supported; "
            "use the float16 or bfloat16 version of the model"
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "is not supported; only silu is")
    if architecture == "LlamaForCausalLM":
        return
    layer_types = raw.get("layer_types")
    if layer_types is None and raw.get("use_sliding_window") and raw.get("sliding_window") is not None:
        slides = fields.positive("num_hidden_layers") > int(raw.get("max_window_layers") or 0)
    else:
        slides = any(kind != "full_attention" for kind in layer_types or [])
    if slides:
        raise fields.error(
            "use_sliding_window",
            f"with layer_types={layer_types!r}: sliding-window attention is not supported; set use_sliding_window to "
            "false (and layer_types to full_attention) if the model's card allows full attention",
        )


def _rope_scaling(fields: _Fields) -> _Fields:
    """Transformers 5's `rope_parameters`, or the older `rope_scaling`."""
    name = "rope_parameters" if fields.raw.get("rope_parameters") is not None else "rope_scaling"
    given = fields.raw.get(name)
    if given is not None and not isinstance(given, dict):
        raise fields.error(name, "is not an object")
    return _Fields(given or {}, f"{fields.source}: {name}")


def _rope(fields: _Fields) -> RopeConfig:
    """Rotary settings from transformers 5's `rope_parameters` or the older `rope_theta` with `rope_scaling`."""
    raw = fields.raw
    scaling = _rope_scaling(fields)
    rope_type = scaling.rope_type
    if not isinstance(rope_type, str) or rope_type not in SUPPORTED_ROPE_TYPES:
        raise ModelLoadError(
            f"{scaling.source}: rope type {rope_type!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    for partial in (raw.get("partial_rotary_factor"), scaling.raw.get("partial_rotary_factor")):
        if partial is not None and partial != 1:
            raise ModelLoadError(f"{fields.source}: partial_rotary_factor={partial!r} is not supported; only 1.0 is")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type=rope_type, theta=theta, factor=scaling.number("factor"))
    return RopeConfig(
        rope_type=rope_type,
        theta=theta,
        factor=scaling.number("factor"),
        low_freq_factor=scaling.number("low_freq_factor"),
        high_freq_factor=scaling.number("high_freq_factor"),
        original_max_position_embeddings=scaling.positive("original_max_position_embeddings"),
    )


def _dtype(fields: _Fields) -> str | None:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    named = fields.raw.get(key)
    if named is None:
        return None
    name = str(named).removeprefix("torch.")
    if name not in FLOAT_DTYPES:
        raise fields.error(key, f"is not supported; supported are {', '.join(FLOAT_DTYPES)}")
    return name
