"""Loads a local Hugging Face folder: what `model_folder` reads, and the safetensors. Nothing is unpickled."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dynamo.serve.engine.dtypes import FLOAT_DTYPES
from dynamo.serve.engine.model import CausalLM
from dynamo.serve.engine.model_config import ModelConfig
from dynamo.serve.engine.model_folder import read_json, read_text_model
from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.engine.tokenizer import Tokenizer
from dynamo.serve.errors import ModelLoadError

__all__ = ["DTYPES", "LoadedModel", "load_model"]

logger = logging.getLogger(__name__)

DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in FLOAT_DTYPES}
"""The types of weights by their names in config.json and `--dtype`."""

EMBED, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAMPLE_STRIDE, SAMPLE_BYTES = 1 << 20, 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to serve.

    Attributes:
        fingerprint: hex digest of configuration, dtype and weights; KV may be shared only where it is equal.
        max_model_len: most tokens of a sequence.
        dtype: of weights, activations and KV.
    """

    model: CausalLM
    config: ModelConfig
    tokenizer: Tokenizer
    sampling_defaults: SamplingDefaults
    fingerprint: str
    max_model_len: int
    dtype: torch.dtype


def load_model(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Callable[[float], None] | None = None,
    check: Callable[[ModelConfig, torch.dtype, int], None] | None = None,
) -> LoadedModel:
    """Loads the model in `folder` onto `device`.

    Args:
        dtype: None takes the checkpoint's, except that float16 becomes float32 on the CPU.
        progress: called with the share of weight bytes loaded, rising from 0 to 1.
        check: told the model's shape, its dtype and its longest sequence before any weight is read; what it raises ends this.

    Raises:
        ModelLoadError: a file is missing, damaged, or asks for something this engine does not serve.
    """
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is not a folder; give a local Hugging Face model folder (with config.json)")
    config = ModelConfig.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    text = read_text_model(folder)
    checkpoint = _Checkpoint(folder)
    config = checkpoint.settle_tying(config)
    stored = checkpoint.stored_dtype() if config.dtype is None else DTYPES[config.dtype]
    dtype = _choose_dtype(dtype, stored, device)
    if check is not None:
        check(config, dtype, text.max_model_len)
    try:
        model = CausalLM(config, device=device, dtype=dtype)
    except RuntimeError as e:  # what torch raises, on any device, for memory it cannot get
        raise ModelLoadError(
            f"{folder}: no room for the weights on {device} as {dtype} ({e}); free memory or choose a smaller dtype"
        ) from e
    digest = checkpoint.fill(model, progress or (lambda share: None))
    digest.update(repr((config, dtype)).encode())
    return LoadedModel(
        model=model,
        config=config,
        tokenizer=text.tokenizer,
        sampling_defaults=text.sampling_defaults,
        fingerprint=digest.hexdigest(),
        max_model_len=text.max_model_len,
        dtype=dtype,
    )


def _choose_dtype(asked: torch.dtype | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    if asked is not None:
        return asked
    # CPUs have no fast float16 arithmetic, and torch's is several times slower than float32.
    return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored


class _Checkpoint:
    """The safetensors files of a folder: which tensor lies in which file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Path] = {}
        for path, promised in self._list_files():
            with _opened(path) as tensors:
                names = set(tensors.keys())
            if missing := sorted((promised or set()) - names):
                raise ModelLoadError(
                    f"{path} lacks {_some(missing)}, which the index promises; download the model again"
                )
            self._files.update(dict.fromkeys(names, path))

    def _list_files(self) -> Iterator[tuple[Path, set[str] | None]]:
        """Yields each file with the tensor names the index promises in it, None without an index."""
        single, index = self._folder / "model.safetensors", self._folder / "model.safetensors.index.json"
        if single.exists():
            yield single, None
            return
        if not index.exists():
            if any(self._folder.glob("*.bin")) or any(self._folder.glob("*.pt*")):
                raise ModelLoadError(
                    f"{self._folder} has only pickled weights, which can run code when loaded and are refused; "
                    "convert them to safetensors"
                )
            raise ModelLoadError(f"{self._folder} has neither model.safetensors nor model.safetensors.index.json")
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(f"{index} has no weight_map; download the model again")
        by_file: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ModelLoadError(f"{index}: weight_map puts {name} in {file!r}, which is not a plain file name")
            by_file.setdefault(file, set()).add(name)
        for file in sorted(by_file):
            yield self._folder / file, by_file[file]

    def stored_dtype(self) -> torch.dtype:
        """The dtype of the embeddings, for configurations that name none."""
        name = EMBED if EMBED in self._files else next(iter(self._files), EMBED)
        return self._read(name).dtype

    def settle_tying(self, config: ModelConfig) -> ModelConfig:
        """Trusts the weights over the configuration: embeddings said to be tied but stored twice and unequal are not."""
        if not config.tie_word_embeddings or LM_HEAD not in self._files or EMBED not in self._files:
            return config
        if torch.equal(self._read(LM_HEAD), self._read(EMBED)):
            return config
        logger.warning("%s ties word embeddings, but stores an lm_head of its own; using that", self._folder)
        return replace(config, tie_word_embeddings=False)

    def fill(self, model: CausalLM, progress: Callable[[float], None]) -> xxhash.xxh3_128:
        """Copies every weight into `model` and returns a digest of names, shapes and sampled bytes.

        Raises:
            ModelLoadError: tensors are missing, have another shape, or are not floating point.
        """
        targets = dict(model.checkpoint_views())
        sources = {name: name for name in targets}
        if model.config.tie_word_embeddings and EMBED not in self._files and LM_HEAD in self._files:
            sources[EMBED] = LM_HEAD
        if missing := sorted(set(sources.values()) - self._files.keys()):
            raise ModelLoadError(
                f"{self._folder}: the weights lack {_some(missing)}; the files belong to another model than "
                "config.json or are incomplete"
            )
        extra = self._files.keys() - sources.values() - {LM_HEAD}
        if unknown := sorted(name for name in extra if not name.endswith("rotary_emb.inv_freq")):
            logger.warning("%s: ignoring tensors the model does not use: %s", self._folder, _some(unknown))
        digests: dict[str, bytes] = {}
        num_filled, num_elements = 0, sum(target.numel() for target in targets.values())
        progress(0.0)
        for path in sorted(set(self._files.values())):
            with _opened(path) as tensors:
                for name, source in sources.items():
                    if self._files[source] != path:
                        continue
                    stored = _fetch(tensors, source, path)
                    _copy(stored, targets[name], source, path)
                    digests[name] = _sample_digest(stored)
                    num_filled += targets[name].numel()
                    progress(num_filled / num_elements)
        return xxhash.xxh3_128(b"".join(name.encode() + digests[name] for name in sorted(digests)))

    def _read(self, name: str) -> Tensor:
        path = self._files.get(name)
        if path is None:
            raise ModelLoadError(f"{self._folder}: the weights lack {name}")
        with _opened(path) as tensors:
            return _fetch(tensors, name, path)


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError as e:
        raise ModelLoadError(f"{path} is missing, though the index names it; download the model again") from e
    except (SafetensorError, OSError) as e:
        raise ModelLoadError(f"{path} is damaged or unreadable ({e}); download the model again") from e


def _fetch(tensors: safe_open, name: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = tensors.get_tensor(name)  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as e:
        raise ModelLoadError(f"{path}: {name} cannot be read ({e}); download the model again") from e
    return tensor


def _copy(stored: Tensor, target: Tensor, name: str, path: Path) -> None:
    if stored.shape != target.shape:
        raise ModelLoadError(
            f"{path}: {name} has shape {list(stored.shape)}, but config.json implies {list(target.shape)}; "
            "the two files belong to different models"
        )
    if stored.dtype not in DTYPES.values():
        raise ModelLoadError(f"{path}: {name} has dtype {stored.dtype}; only {', '.join(DTYPES)} are served")
    target.copy_(stored)


def _sample_digest(stored: Tensor) -> bytes:
    """Digest of a tensor's dtype, shape and bytes: 4 KiB of every MiB, and its last 4 KiB."""
    data = stored.contiguous().flatten().view(torch.uint8).numpy()
    digest = xxhash.xxh3_128(f"{stored.dtype}{list(stored.shape)}".encode())
    for start in range(0, len(data), SAMPLE_STRIDE):
        digest.update(data[start : start + SAMPLE_BYTES].tobytes())
    digest.update(data[-SAMPLE_BYTES:].tobytes())
    return digest.digest()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
