"""What a local Hugging Face folder says of a model's text: tokenizer, chat template, generation defaults, context.

This module loads no torch: a front that leaves the arithmetic to worker processes reads its model with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynamo.serve.engine.model_config import TextLimits, token_ids
from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import ModelLoadError
from dynamo.serve.path_refusal import path_refusal

__all__ = ["TextModel", "read_json", "read_text_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextModel:
    """A model without its weights.

    Attributes:
        tokenizer: with the chat template, and the tokens that end a generation.
        max_model_len: most tokens of a sequence.
    """

    tokenizer: Tokenizer
    sampling_defaults: SamplingDefaults
    max_model_len: int


def read_text_model(folder: Path) -> TextModel:
    """Reads all of a model's folder but its weights; the architecture may be one that this project does not compute.

    Raises:
        ModelLoadError: a file is missing or damaged.
    """
    limits = TextLimits.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path, required=False)
    eos = token_ids(generation.get("eos_token_id")) or limits.eos_token_ids
    return TextModel(
        tokenizer=Tokenizer.from_folder(folder, eos_token_ids=frozenset(eos), num_embeddings=limits.vocab_size),
        sampling_defaults=_sampling_defaults(generation, generation_path),
        max_model_len=limits.max_position_embeddings,
    )


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """The JSON object in a file; empty when the file is missing and may be.

    Raises:
        ModelLoadError: the file is missing or holds something else.
    """
    if not required and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ModelLoadError(f"{path} is missing; a complete Hugging Face model folder has it") from e
    except OSError as e:
        raise ModelLoadError(f"{path}: {path_refusal(path, e, 'read')}") from e
    except ValueError as e:
        raise ModelLoadError(f"{path} cannot be read: {e}; download the model again") from e
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} holds a {type(value).__name__} where a JSON object belongs")
    return value


def _sampling_defaults(raw: dict[str, Any], path: Path) -> SamplingDefaults:
    """What generation_config.json proposes; what it leaves out is as in `SamplingDefaults`."""
    fallback = SamplingDefaults()

    def number(key: str, lowest: float, highest: float) -> float | None:
        value = raw.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value <= highest:
            raise ModelLoadError(f"{path}: {key}={value!r} is not a number from {lowest:g} to {highest:g}")
        return float(value)

    temperature, min_p = number("temperature", 0, 100), number("min_p", 0, 1)
    top_k, max_tokens = number("top_k", 0, 1 << 31), number("max_new_tokens", 1, 1 << 31)
    return SamplingDefaults(
        temperature=fallback.temperature if temperature is None else temperature,
        top_p=number("top_p", 0, 1) or fallback.top_p,
        top_k=int(top_k) if top_k else None,  # 0 means no limit
        min_p=fallback.min_p if min_p is None else min_p,
        repetition_penalty=number("repetition_penalty", 0, 100) or fallback.repetition_penalty,
        max_tokens=None if max_tokens is None else int(max_tokens),
    )
