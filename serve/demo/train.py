"""Trains the demo model: `python -m dynamo.serve.demo.train OUT_DIR`, about 10 CPU-minutes on one core.

A Llama of 2 million parameters learns the standard library's docstrings (`dynamo.serve.demo.corpus`), most of them as
questions and answers. The folder it writes is an ordinary Hugging Face checkpoint. Matrices are trained with Muon
(Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), which at this size learns about twice as much per step as
AdamW; embeddings and norms with AdamW. Needs torch >= 2.9 for `torch.optim.Muon`.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

from dynamo.serve.demo.corpus import collect_entries, render_documents

__all__ = ["DemoLlama", "main", "save", "train", "train_tokenizer"]

SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}<|system|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<|end|>"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "torch_dtype": "float16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
}
LICENSE_NOTE = """The weights and the tokenizer in this folder were trained by `python -m dynamo.serve.demo.train` on the
docstrings and help topics of Python's standard library, which are (c) Python Software Foundation and used under the
PSF License Version 2 (https://docs.python.org/3/license.html). The weights are released under this project's
Apache-2.0 licence.
"""


class Block(nn.Module):
    """One Llama layer over x: [batch, time, hidden]; parameter names are those of Hugging Face checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        hidden, inner, dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
        self.num_heads, self.num_kv_heads, self.dim = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"], dim
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, self.num_heads * dim, bias=False),
                "k_proj": nn.Linear(hidden, self.num_kv_heads * dim, bias=False),
                "v_proj": nn.Linear(hidden, self.num_kv_heads * dim, bias=False),
                "o_proj": nn.Linear(self.num_heads * dim, hidden, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(hidden, inner, bias=False),
                "up_proj": nn.Linear(hidden, inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(hidden, eps=CONFIG["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=CONFIG["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time_steps, _ = x.shape
        h = self.input_layernorm(x)
        q, k, v = (
            self.self_attn[f"{name}_proj"](h).view(batch, time_steps, -1, self.dim).transpose(1, 2) for name in "qkv"
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.self_attn["o_proj"](attended.transpose(1, 2).reshape(batch, time_steps, -1))
        h = self.post_attention_layernorm(x)
        gated = F.silu(self.mlp["gate_proj"](h)) * self.mlp["up_proj"](h)
        out: Tensor = x + self.mlp["down_proj"](gated)
        return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split form of Hugging Face; x: [batch, heads, time, dim], cos and sin: [time, dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class DemoLlama(nn.Module):
    """The trained network with tied embeddings; tokens: int64 [batch, time] -> logits [batch, time, vocab]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Block() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = nn.RMSNorm(CONFIG["hidden_size"], eps=CONFIG["rms_norm_eps"])
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / (
                    math.sqrt(2 * len(self.layers)) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                )
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        dim = CONFIG["head_dim"]
        inverse = 1.0 / CONFIG["rope_theta"] ** (torch.arange(0, dim, 2) / dim)
        angles = torch.arange(tokens.shape[1])[:, None] * inverse
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        return F.linear(self.norm(x), self.embed_tokens.weight)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of 2,048 entries; digits are split one by one, `<|begin|>` is put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B:1", special_tokens=[("<|begin|>", 0)]
    )
    return tokenizer


def packed_batches(
    tokenizer: Tokenizer, documents: list[str], rng: random.Random, batch: int, time_steps: int
) -> list[Tensor]:
    """One epoch: documents shuffled, concatenated and cut into int64 tensors [batch, time_steps + 1]."""
    rng.shuffle(documents)
    ids = [token for encoding in tokenizer.encode_batch(documents) for token in encoding.ids]
    row = time_steps + 1
    rows = torch.tensor(ids[: len(ids) // row * row]).view(-1, row)
    return [piece for piece in torch.split(rows, batch) if len(piece) == batch]


def train(num_steps: int, seed: int, batch: int, time_steps: int) -> tuple[DemoLlama, Tokenizer, float]:
    """Trains for `num_steps` steps; returns the model, the tokenizer and the validation loss in nats a token."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    entries = collect_entries()
    rng.shuffle(entries)
    held_out, kept = entries[:150], entries[150:]
    tokenizer = train_tokenizer([f"{entry.name}{entry.signature}\n\n{entry.doc}" for entry in kept])
    validation = packed_batches(tokenizer, list(render_documents(held_out, rng)), rng, 8, time_steps)
    model = DemoLlama()
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    pending: list[Tensor] = []
    for step in range(num_steps):
        pending = pending or packed_batches(tokenizer, list(render_documents(kept, rng)), rng, batch, time_steps)
        tokens = pending.pop()
        scale = min(1.0, (step + 1) / 40, max(0.02, 2 * (1 - step / num_steps)))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * scale
        loss = next_token_loss(model, tokens)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 49:
            print(f"step {step + 1} of {num_steps}  loss {loss.item():.3f}", file=sys.stderr, flush=True)
    with torch.no_grad():
        loss_value = sum(next_token_loss(model, piece).item() for piece in validation) / len(validation)
    return model, tokenizer, loss_value


def next_token_loss(model: DemoLlama, tokens: Tensor) -> Tensor:
    """Mean cross entropy in nats of int64 tokens [batch, time + 1], with bfloat16 matrix products."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def save(model: DemoLlama, tokenizer: Tokenizer, out_dir: Path) -> None:
    """Writes an ordinary Hugging Face folder with float16 weights."""
    out_dir.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": value.detach().to(torch.float16) for name, value in model.state_dict().items()}
    save_file(weights, out_dir / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out_dir / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (out_dir / name).write_text(json.dumps(content, indent=2) + "\n")
    (out_dir / "LICENSE.txt").write_text(LICENSE_NOTE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dynamo.serve.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=1400, help="training steps (default: 1400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, default=1, help="torch threads (default: 1, which gives the shipped weights)"
    )
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--time-steps", type=int, default=320, help="tokens a sequence (default: 320)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer, loss = train(args.steps, args.seed, args.batch, args.time_steps)
    save(model, tokenizer, args.out_dir)
    print(f"validation loss {loss:.3f} nats a token after {time.process_time():.0f} CPU-seconds; wrote {args.out_dir}")


if __name__ == "__main__":
    main()
