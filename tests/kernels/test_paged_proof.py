import pytest
import torch

from dynamo.kernels import paged_proof
from dynamo.kernels.paged_proof import find_paged_fault

SHAPE = {"num_q_heads": 6, "num_kv_heads": 2, "head_dim": 32, "block_size": 16}
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_good_kernels_have_no_fault(dtype):
    assert find_paged_fault(CPU, dtype, **SHAPE) is None


@pytest.mark.parametrize("name", ["paged_write", "paged_decode", "paged_prefill"])
def test_a_kernel_that_does_nothing_is_found_out_by_name(monkeypatch, name):
    monkeypatch.setattr(paged_proof, name, lambda *args, **options: None)
    fault = find_paged_fault(CPU, torch.float32, **SHAPE)
    assert fault is not None
    assert fault.startswith(name)


def test_a_decode_that_looks_at_one_token_too_few_is_found_out(monkeypatch):
    original = paged_proof.paged_decode

    def short(q, k_cache, v_cache, tables, context_lens, **options):
        return original(q, k_cache, v_cache, tables, (context_lens - 1).clamp(min=1), **options)

    monkeypatch.setattr(paged_proof, "paged_decode", short)
    assert "paged_decode" in (find_paged_fault(CPU, torch.float32, **SHAPE) or "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernels_are_right_on_this_gpu(dtype):
    assert find_paged_fault(torch.device("cuda"), dtype, **SHAPE) is None
