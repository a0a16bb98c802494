"""Folders load or are refused with the file's name and a way out; equal fingerprints mean equal weights."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamo.serve import demo
from dynamo.serve.engine.loader import LoadedModel, load_model
from dynamo.serve.engine.model_config import ModelConfig
from dynamo.serve.engine.request import SamplingDefaults
from dynamo.serve.engine.rope import inverse_frequencies
from dynamo.serve.errors import ModelLoadError

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def original(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("Llama", num_hidden_layers=2)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, device=CPU, **options)


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_sharded_checkpoint_equals_the_single_file(make_checkpoint: Callable[..., Path], original: Path) -> None:
    sharded = make_checkpoint("Llama", num_hidden_layers=2, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    single, several = load(original), load(sharded)
    assert several.fingerprint == single.fingerprint
    for (name, a), (_, b) in zip(single.model.checkpoint_views(), several.model.checkpoint_views(), strict=True):
        assert torch.equal(a, b), name


def test_progress_rises_from_zero_to_one(folder: Path) -> None:
    shares: list[float] = []
    load(folder, progress=shares.append)
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)


def test_automatic_dtype_is_the_checkpoints_but_float16_is_widened_on_the_cpu(make_checkpoint: Any) -> None:
    half = make_checkpoint("Qwen2", dtype=torch.float16, num_hidden_layers=1)
    brain = make_checkpoint("Qwen2", dtype=torch.bfloat16, num_hidden_layers=1)
    assert load(half).dtype == torch.float32
    assert load(half, dtype=torch.float16).dtype == torch.float16
    assert load(brain).dtype == torch.bfloat16
    edit_json(brain / "config.json", dtype=..., torch_dtype=...)
    assert load(brain).dtype == torch.bfloat16


def test_generation_defaults_and_end_tokens_come_from_the_folder(folder: Path) -> None:
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 1], "temperature": 0.6, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.1})
    )
    loaded = load(folder)
    defaults = loaded.sampling_defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.repetition_penalty) == (0.6, 0.9, None, 1.1)
    assert loaded.tokenizer.eos_token_ids == {1, 3}
    assert loaded.max_model_len == 1024


def test_a_folder_without_generation_config_loads(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    loaded = load(folder)
    assert loaded.sampling_defaults == SamplingDefaults()
    assert loaded.tokenizer.eos_token_ids == {1}


@pytest.mark.parametrize("key", ["temperature", "top_p"])
def test_nonsense_generation_defaults_are_refused(folder: Path, key: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps({key: -1}))
    with pytest.raises(ModelLoadError, match=rf"generation_config\.json: {key}=-1"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "GPT2LMHeadModel.*LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ),
        ({"architectures": ...}, "architectures=None is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoints"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"vocab_size": "many"}, "vocab_size='many' is not a positive number"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"attention_bias": 1}, "attention_bias=1 is not true or false"),
    ],
)
def test_unsupported_configurations_are_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ModelLoadError, match=message):
        load(folder)


def test_sliding_windows_are_refused(make_checkpoint: Callable[..., Path]) -> None:
    sliding = make_checkpoint("Qwen2", num_hidden_layers=2, use_sliding_window=True, max_window_layers=1)
    with pytest.raises(ModelLoadError, match="sliding-window attention is not supported"):
        load(sliding)
    edit_json(sliding / "config.json", layer_types=..., sliding_window=64)
    with pytest.raises(ModelLoadError, match="sliding-window attention is not supported"):
        load(sliding)


def test_old_and_new_spellings_of_rope_settings_agree() -> None:
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for new, old in [
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_type": "llama3", "rope_theta": 5e5, **llama3},
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **llama3}},
        ),
    ]:
        a = ModelConfig.from_json(shape | {"rope_parameters": new}, "config.json")
        b = ModelConfig.from_json(shape | old, "config.json")
        assert a == b
        assert torch.equal(inverse_frequencies(a.rope, 4), inverse_frequencies(b.rope, 4))
    assert a.num_kv_heads == 2
    assert a.head_dim == 4


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelLoadError, match=name.replace(".", r"\.")):
        load(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_damaged_json_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"half": ')
    with pytest.raises(ModelLoadError, match=r"cannot be read|not a tokenizer"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 100_000])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged or unreadable"):
        load(folder)


def test_missing_tensors_are_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelLoadError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


def test_wrong_shapes_are_named(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has shape \[3\].*\[64\]"):
        load(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight has dtype torch\.int8"):
        load(folder)


def test_extra_tensors_are_ignored_with_a_warning_unless_known_harmless(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    with caplog.at_level(logging.WARNING):
        before = load(folder).fingerprint
    assert not caplog.records
    edit_weights(folder, lambda t: t.update({"vision.weight": torch.ones(8)}))
    with caplog.at_level(logging.WARNING):
        assert load(folder).fingerprint == before
    assert "vision.weight" in caplog.text


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="pickled weights, which can run code"):
        load(folder)


def test_a_missing_or_unlisted_shard_is_named(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sharded = Path(shutil.copytree(make_checkpoint("Llama", max_shard_size="100KB"), tmp_path / "sharded"))
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=weight_map | {"model.norm.weight": weight_map["model.embed_tokens.weight"]})
    with pytest.raises(ModelLoadError, match=r"lacks model\.norm\.weight, which the index promises"):
        load(sharded)
    edit_json(index, weight_map=weight_map | {"model.norm.weight": "../elsewhere.safetensors"})
    with pytest.raises(ModelLoadError, match="not a plain file name"):
        load(sharded)
    edit_json(index, weight_map=weight_map)
    (sharded / weight_map["model.norm.weight"]).unlink()
    with pytest.raises(ModelLoadError, match="is missing, though the index names it"):
        load(sharded)


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_the_fingerprint_tells_different_weights_apart(folder: Path, name: str) -> None:
    before = load(folder).fingerprint
    assert load(folder).fingerprint == before

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] += 1

    edit_weights(folder, nudge)
    assert load(folder).fingerprint != before


def test_the_fingerprint_tells_configurations_and_dtypes_apart(folder: Path) -> None:
    before = load(folder).fingerprint
    assert load(folder, dtype=torch.bfloat16).fingerprint != before
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert load(folder).fingerprint != before


def test_tied_embeddings_that_are_stored_twice_and_differ_are_not_tied(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    loaded = load(folder)
    assert not loaded.config.tie_word_embeddings
    assert not torch.equal(loaded.model.lm_head, loaded.model.embed)
    edit_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    loaded = load(folder)
    assert loaded.config.tie_word_embeddings
    assert loaded.model.lm_head is loaded.model.embed


def test_tied_embeddings_may_be_stored_as_the_output_layer(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)

    def keep_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_weights(folder, keep_head)
    loaded = load(folder)
    assert loaded.model.lm_head is loaded.model.embed


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=1 << 40, intermediate_size=1 << 40)
    with pytest.raises(ModelLoadError, match="no room for the weights on cpu"):
        load(folder)


def test_the_shipped_model_loads() -> None:
    loaded = load(Path(demo.__file__).parent / "model")
    assert loaded.config.head_dim == 32
    assert loaded.tokenizer.apply_chat_template([{"role": "user", "content": "What does os.getcwd do?"}])
