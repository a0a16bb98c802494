"""Tiny random checkpoints and a plain-tensor stand-in for the cache's layers."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]


def train_byte_level_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer whose first ids are SPECIAL_TOKENS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "the quick brown fox jumps over the lazy dog",
        "naïve café déjà vu",
        "größer, schöner, weiter",
        "日本語の文字 ✅",
    ]
    tokenizer.train_from_iterator(texts * 20, trainer)
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    train_byte_level_tokenizer(320).save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """Writes a small byte-level tokenizer of 320 tokens and its configuration into a folder."""
    return save_tokenizer


CheckpointFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """Saves a random model with transformers; its weights are wide enough that argmax has clear winners.

    `make_checkpoint("Llama", tie_word_embeddings=True, ...)` returns the folder; keywords go to the configuration.
    """

    def make(family: str, *, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **settings: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

            transformers.utils.logging.set_verbosity_error()
            transformers.utils.logging.disable_progress_bar()
            shape = {
                "vocab_size": 320,
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 1024,
                "initializer_range": 0.3,
                "bos_token_id": 0,
                "eos_token_id": 1,
            }
            config = getattr(transformers, f"{family}Config")(**(shape | settings))
            torch.manual_seed(5)
            model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith(("norm.weight", "bias")):
                        parameter.add_(torch.randn_like(parameter) * 0.2)
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        save_tokenizer(folder)
        return folder

    return make
