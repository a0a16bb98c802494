"""The kernel benchmark: its sections on small sizes, how they are run, and what becomes of failures."""

import argparse
import dataclasses
import importlib.util
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from dynamo.kernels.calibration import default_calibration
from dynamo.kernels.copy_blocks import copy_blocks, specializations
from dynamo.kernels.fake_driver import FakeDriver
from dynamo.kernels.staged import Staging
from dynamo.kernels.view import View
from dynamo.perf import (
    kernels_attention,
    kernels_beside,
    kernels_device,
    kernels_measure,
    kernels_pinned,
    kernels_transforms,
)
from dynamo.perf.harness import BenchmarkError
from dynamo.perf.kernels import add_arguments, run
from dynamo.perf.kernels_cpu import cpu_copies
from dynamo.perf.kernels_decode import LLAMA_3_8B, DecodeShape, measure_decode
from dynamo.perf.kernels_layouts import LayoutCase, conversions, rows
from dynamo.perf.kernels_measure import CudaTimer, WallTimer, busy_core, paired, paired_cpu
from dynamo.perf.kernels_peers import PointerList, UniversalPack
from dynamo.perf.kernels_planning import planning
from dynamo.perf.kernels_plot import draw
from dynamo.perf.kernels_sections import SECTIONS, Section, run_section
from dynamo.perf.kernels_workload import Findings, Workload
from dynamo.perf.machine import machine_record
from dynamo.perf.report import Report, Result

QUIET = Console(file=io.StringIO())
CPU = torch.device("cpu")
TINY = Workload(mib=1, repeats=1, device="cpu")


def options(*arguments: str, out: Path | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args(arguments)
    parsed.out = out
    return parsed


def result(case: str = "case", subject: str = "dynamo-kv", metric: str = "payload", value: float = 1.0) -> Result:
    return Result(case=case, subject=subject, metric=metric, value=value, unit="GB/s")


def split(findings: Findings) -> tuple[list[Result], list[str]]:
    found = list(findings)
    return [f for f in found if isinstance(f, Result)], [f for f in found if isinstance(f, str)]


OWN_SECTIONS = """
import json, time
from dynamo.perf.report import Result


def _one(workload):
    print("chatter of a library")
    return Result(case="case", subject="dynamo-kv", metric="payload", value=float(workload.mib), unit="GB/s")


def finds(workload):
    yield _one(workload)
    yield "a note"


def fails(workload):
    yield _one(workload)
    raise RuntimeError("an illegal memory access was encountered")


def hangs(workload):
    yield _one(workload)
    time.sleep(60)
"""


@pytest.fixture
def own_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Section]:
    """Sections of a module that the processes find on their path."""
    (tmp_path / "own_sections.py").write_text(OWN_SECTIONS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(function: str, *, needs_cuda: bool = False, limit_s: float = 60.0) -> Section:
        return Section(function, f"what {function}", f"own_sections:{function}", needs_cuda=needs_cuda, limit_s=limit_s)

    return make


@pytest.mark.parametrize("make", [rows, conversions])
def test_layout_cases_hold_as_many_bytes_as_they_say(
    make: Callable[[int, int, torch.device], Iterator[LayoutCase]],
) -> None:
    cases = list(make(256, 1 << 20, CPU))
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        groups = case.src.layers_per_group * case.src.head_groups * case.src.num_planes
        rows_of_block = case.src.num_tokens * case.src.num_heads * groups
        assert case.num_bytes == case.src_ids.size * rows_of_block * case.src.row_bytes
        for other in case.others:
            other.run()


def test_pairs_are_timed_with_their_ceiling() -> None:
    calls: list[str] = []
    speed = paired(WallTimer(), lambda: calls.append("ours"), lambda: calls.append("limit"), 1000, repeats=2)
    assert calls == ["limit", "ours"] * 3
    assert speed.gb_s > 0
    wall, cpu = paired_cpu(lambda: sum(range(10_000)), lambda: sum(range(10_000)), 1000, repeats=3)
    assert min(cpu.gb_s, cpu.share, wall.gb_s, wall.share) > 0


def test_the_busy_neighbour_is_gone_afterwards() -> None:
    before = set(Path("/proc").glob("[0-9]*/task"))
    with busy_core():
        pass
    assert not {path for path in set(Path("/proc").glob("[0-9]*/task")) - before if _is_spinning(path)}


def _is_spinning(path: Path) -> bool:
    try:
        return b"for _ in range(1 << 20): pass" in (path.parent / "cmdline").read_bytes()
    except OSError:
        return False


def test_cpu_copies_measure_every_case_idle_and_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo.perf.kernels_cpu.ROW_SIZES", (32 << 10,))
    threads = torch.get_num_threads()
    results, notes = split(cpu_copies(TINY))
    assert torch.get_num_threads() == threads
    assert {r.metric for r in results} == {"payload", "payload of ceiling", "threads at work"}
    ours = {r.case for r in results if r.subject == "dynamo-kv copy_blocks"}
    assert {case.rpartition(", ")[0] for case in ours if case.endswith(", idle")} == {
        case.rpartition(", ")[0] for case in ours if case.endswith(", busy core")
    }
    assert any("NHD to HND" in case for case in ours)
    assert all(r.value > 0 for r in results)
    assert "memmove" in notes[0]


class _FakeEvent:
    """An event of a GPU whose work is done when it is queued."""

    def record(self, stream: object = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        return

    def elapsed_time(self, other: "_FakeEvent") -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """CPU memory plays the GPU's, and the peers' kernels, which have tests of their own, do nothing."""
    driver = FakeDriver(max_batch=1 << 20)
    stream = SimpleNamespace(cuda_stream=driver.stream_new(0))
    for module in (kernels_pinned, kernels_beside, kernels_transforms):
        monkeypatch.setattr(module, "cuda_driver", lambda: driver)
    for module in (kernels_pinned, kernels_beside):
        monkeypatch.setattr(module, "new_stream", lambda device: stream)
    monkeypatch.setattr(kernels_beside, "new_event", _FakeEvent)
    monkeypatch.setattr(kernels_beside, "copy_blocks", _copy_on_any_stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(PointerList, "run", lambda self, programs=1: None)
    monkeypatch.setattr(UniversalPack, "run", lambda self: None)
    return driver


def test_the_gpu_is_kept_busy_for_as_long_as_an_action_takes_to_queue(
    fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(kernels_measure, "new_event", _FakeEvent)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: calls.append("flush"))
    monkeypatch.setattr(kernels_measure, "timed", lambda action: SimpleNamespace(wall_s=action() or 0.0))
    timer = CudaTimer(CPU)

    def action(queueing_s: float) -> float:
        calls.append("action")
        return queueing_s

    num_flushes = []
    for queueing_s in (0.0, 1e-4, 1e9):
        timer.prepare(lambda queueing_s=queueing_s: action(queueing_s))
        calls.clear()
        assert timer.seconds(lambda: action(0.0)) >= 0.0
        assert calls.pop() == "action"
        num_flushes.append(calls.count("flush"))
    assert num_flushes[0] == 1 < num_flushes[1] < num_flushes[2] < 1 << 20


def _copy_on_any_stream(
    src: View, src_ids: Any, dst: View, dst_ids: Any, *, sm_budget: int | None, stream: Any
) -> None:
    copy_blocks(src, src_ids, dst, dst_ids, sm_budget=sm_budget)


def test_device_copies_are_measured_beside_their_peers(fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_device, "_ROW_SIZES", (256,))
    results, _ = split(kernels_device.device_copies(TINY))
    subjects = {r.subject for r in results}
    assert {"dynamo-kv copy_blocks", "vLLM's way: pointer list, 8 B accesses, all SMs"} <= subjects
    assert {"Dynamo's way: element by element", "torch index_select + copy_"} <= subjects
    assert all(r.value > 0 for r in results)


def test_every_route_over_the_bus_is_measured_by_size_of_the_pieces(
    fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_pinned, "calibrate", lambda driver, refresh: default_calibration())
    results, notes = split(kernels_pinned.pinned_copies(TINY))
    copies = {(r.case, r.subject) for r in results if r.metric == "payload"}
    for direction in ("GPU to host", "host to GPU"):
        assert {case.rpartition("pieces of ")[2] for case, _ in copies if case.startswith(direction)} == {
            f"{kib} KiB" for kib in (4, 16, 32, 64, 256)
        }
    subjects = " ".join(subject for _, subject in copies)
    for way in (
        "zero-copy, 4 SMs",
        "copy engine",
        "staged",
        "plan and run (",
        "pointer list",
        "cudaMemcpyAsync per piece",
    ):
        assert way in subjects
    assert any(note.startswith("calibration: ") for note in notes)


@pytest.mark.parametrize("crossing_index", [0, 1])
def test_bus_copies_really_copy(fake_gpu: FakeDriver, crossing_index: int) -> None:
    crossing = list(kernels_pinned.crossings(2, 1 << 18, CPU, fake_gpu))[crossing_index]
    source, target = crossing.src.tensors, crossing.dst.tensors
    for tensor in source:
        tensor.random_(0, 255)
    stream = fake_gpu.stream_new(0)
    wanted = []
    with Staging(fake_gpu, num_bytes=1 << 20) as staging:
        for name, action in kernels_pinned.ways(crossing, fake_gpu, staging, CPU):
            if "vLLM" in name:
                continue
            for tensor in target:
                tensor.zero_()
            action()
            wanted.append([tensor.clone() for tensor in target])
    assert stream and len(wanted) > 5
    assert wanted[0][0].any()
    for found in wanted[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted[0], strict=True))


def test_batches_and_their_cap_are_measured_by_number_of_pieces(fake_gpu: FakeDriver) -> None:
    results, _ = split(kernels_pinned.batched_copies(TINY))
    assert {r.metric for r in results} == {"payload", "payload of ceiling", "submit"}
    results, _ = split(kernels_pinned.batch_cap(TINY))
    assert [r.subject for r in results][-1] == "one call of 65,536 pieces"


def test_both_page_sizes_are_measured_and_memory_is_unpinned(fake_gpu: FakeDriver) -> None:
    results, _ = split(kernels_pinned.page_sizes(TINY))
    assert {r.subject for r in results} == {"4 KiB pages", "2 MiB pages"}
    assert fake_gpu.count("host_register") == fake_gpu.count("host_unregister") == 2


def test_depths_go_through_tiles_stages_and_programs(fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses_long_pipelines(crossing: Any, device: Any, tile: int, stages: int, programs: int) -> Callable[[], None]:
        if stages == 5:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return lambda: None

    pytest.importorskip("triton", reason="needs Triton")
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(kernels_pinned, "zero_copy", refuses_long_pipelines)
    results, notes = split(kernels_pinned.pipeline_depths(TINY))
    refused = "GPU to host, 4 blocks in pieces of 32 KiB, 16 KiB tile, 5 stages, 1 programs: out of resource: shared"
    assert any(note.startswith(refused) for note in notes)
    assert len({r.subject for r in results}) == 2 * 2 * 4


def test_a_matmul_is_timed_alone_and_beside_every_way(fake_gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_beside, "_SIDE", 64)
    monkeypatch.setattr(kernels_beside, "_HEADS", (8,))
    results, _ = split(kernels_beside.beside_matmul(TINY))
    assert {r.metric for r in results} == {"payload", "matmul slower by"}
    assert {"dynamo-kv staged, 4 SMs", "dynamo-kv copy engine", "dynamo-kv copy_blocks, 8 SMs"} <= {
        r.subject for r in results
    }


def test_transforms_are_measured_within_a_device_and_over_the_bus(fake_gpu: FakeDriver) -> None:
    results, _ = split(kernels_transforms.transforms(TINY))
    assert {"quantise to fp8_e4m3", "restore from int8", "digest", "copy and digest", "offload as int8"} <= {
        r.case for r in results
    }
    assert all(r.value > 0 for r in results)


def test_equal_devices_give_equal_bits() -> None:
    results, _ = split(kernels_transforms.exactness(TINY))
    assert len(results) == 6
    assert {r.value for r in results} == {0.0}


def test_attention_is_measured_for_decode_and_prefill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_attention, "_DECODES", ((2, 40),))
    monkeypatch.setattr(kernels_attention, "_PREFILLS", ((20, 20), (8, 40)))
    results, _ = split(kernels_attention.attention(TINY))
    assert {r.case for r in results} == {
        "decode, 2 x 40 tokens",
        "prefill, 20 of 20 tokens",
        "prefill, 8 of 40 tokens",
    }


def test_decoding_is_measured_in_the_engine_and_in_transformers() -> None:
    small = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 3}
    shape = DecodeShape(
        LLAMA_3_8B | small, batches=(1, 3), prompt_tokens=20, new_tokens=8, repeats=1, dtype=torch.float32
    )
    results, _ = split(measure_decode(shape, CPU))
    assert [(r.case, r.subject) for r in results] == [
        (f"decode, batch {batch}, 20 prompt tokens", name)
        for name in ("dynamo-kv engine", "transformers generate")
        for batch in (1, 3)
    ]
    assert all(r.value > 0 and r.unit == "tokens/s" for r in results)


def test_planning_counts_pieces_up_to_65_536() -> None:
    results, _ = split(planning(TINY))
    cases = {"1,024 pieces", "8,192 pieces", "65,536 pieces", "65,536 single blocks"}
    assert {r.case for r in results} == {f"onboard {case}" for case in cases}
    assert all(r.unit == "ms" and r.value > 0 for r in results)


def test_sections_are_named_once_and_their_functions_exist() -> None:
    assert len({section.name for section in SECTIONS}) == len(SECTIONS)
    for section in SECTIONS:
        module, _, function = section.place.partition(":")
        source = importlib.util.find_spec(module)
        assert source is not None and source.origin is not None
        assert f"\ndef {function}(workload: Workload) -> Findings:" in Path(source.origin).read_text()
    assert {section.name for section in SECTIONS if not section.needs_cuda} == {"cpu", "planning"}


def test_findings_of_a_process_come_back_without_its_chatter(own_sections: Callable[..., Section]) -> None:
    results, notes = split(run_section(own_sections("finds"), TINY, QUIET))
    assert [r.value for r in results] == [1.0]
    assert notes == ["a note"]


def test_what_was_measured_before_a_failure_is_kept(own_sections: Callable[..., Section]) -> None:
    console = Console(file=io.StringIO())
    results, notes = split(run_section(own_sections("fails"), TINY, console))
    assert len(results) == 1
    assert notes == ["fails: FAILED with status 1: RuntimeError: an illegal memory access was encountered"]
    assert isinstance(console.file, io.StringIO) and "Traceback" in console.file.getvalue()


@pytest.mark.slow
def test_a_section_that_hangs_is_ended_and_what_it_had_was_there_before(own_sections: Callable[..., Section]) -> None:
    console = Console(file=io.StringIO())
    started, findings = time.monotonic(), run_section(own_sections("hangs", limit_s=10.0), TINY, console)
    assert isinstance(next(findings), Result)
    assert time.monotonic() - started < 10.0
    assert isinstance(console.file, io.StringIO) and console.file.getvalue() == "  case\n"
    assert list(findings) == ["hangs: FAILED, not done after 10 s"]


def test_a_section_nobody_waits_for_any_more_is_ended(own_sections: Callable[..., Section]) -> None:
    findings = run_section(own_sections("hangs"), TINY, QUIET)
    next(findings)
    started = time.monotonic()
    findings.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30.0  # its process would have gone on for 60 s


def test_a_run_that_is_killed_within_a_section_leaves_what_it_had(
    own_sections: Callable[..., Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[Result]:
        yield result()
        yield result(subject="second")
        raise KeyboardInterrupt

    monkeypatch.setattr("dynamo.perf.kernels.SECTIONS", (own_sections("finds"),))
    monkeypatch.setattr("dynamo.perf.kernels.run_section", interrupted)
    monkeypatch.setattr("dynamo.perf.kernels._KEPT_EVERY_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run(options(out=tmp_path / "results"), QUIET)
    (path,) = (tmp_path / "results").iterdir()
    assert [json.loads(line)["record"] for line in path.read_text().splitlines()] == ["run", "result", "result"]


def test_a_run_keeps_results_draws_them_and_says_what_it_skipped(
    own_sections: Callable[..., Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = (own_sections("finds"), own_sections("fails"), own_sections("hangs", needs_cuda=True))
    monkeypatch.setattr("dynamo.perf.kernels.SECTIONS", sections)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    out = tmp_path / "results"
    report = run(options("--mib", "3", out=out), QUIET)
    assert [r.value for r in report.results] == [3.0, 3.0]
    assert "skipped, since torch sees no CUDA device: hangs (what hangs)" in report.notes
    lines = [json.loads(line) for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert [line["record"] for line in lines] == ["run", "result", "result"]


def test_a_run_that_measures_nothing_is_an_error(
    own_sections: Callable[..., Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo.perf.kernels.SECTIONS", (own_sections("hangs", needs_cuda=True),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BenchmarkError, match="nothing was measured: skipped"):
        run(options(), QUIET)


@pytest.mark.parametrize("arguments", [("--repeats", "0"), ("--mib", "0")])
def test_nonsensical_sizes_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(BenchmarkError, match="at least 1"):
        run(options(*arguments), QUIET)


def test_machine_code_is_shown_per_architecture_with_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="needs Triton")
    listed = next(iter(specializations()))
    strict = dataclasses.replace(listed, name="strict", max_registers=1, architectures=(90,))
    monkeypatch.setattr("dynamo.perf.kernels_aot.all_specializations", lambda: [listed, strict])
    report = run(options("--aot", out=tmp_path), QUIET)
    assert report.benchmark == "kernels-aot"
    assert {(r.case, r.subject) for r in report.results} == {
        *((listed.name, f"sm_{architecture}") for architecture in listed.architectures),
        ("strict", "sm_90"),
    }
    assert {r.value for r in report.results if r.metric == "spills"} == {0.0}
    assert "the budget is 1" in report.notes[0] and report.notes[0].startswith("strict, sm_90: ")


def _report(*results: Result) -> Report:
    return Report(benchmark="kernels", title="title", machine=machine_record(), parameters={}, results=results)


def test_shares_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    shares = [result(subject=name, metric="payload of ceiling", value=90.0) for name in ("dynamo-kv x", "torch y")]
    assert draw(_report(*shares, result()), tmp_path / "deep" / "plot.png") is None
    assert (tmp_path / "deep" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_there_is_no_plot_without_shares_or_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = draw(_report(result()), tmp_path / "plot.png")
    assert said == "no plot: nothing was measured against a ceiling"
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = draw(_report(result(metric="payload of ceiling")), tmp_path / "plot.png")
    assert said is not None and "dynamo-kv[perf]" in said
    assert list(tmp_path.iterdir()) == []
