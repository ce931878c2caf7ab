"""bench/gpu.py: the sweep, the figures, and the whole command on the CPU with a tiny model."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import gpu, gpu_report, measure
from megatron_ext.errors import EXIT_CODE, ConfigError


def cases(*words: str) -> list[gpu.Case]:
    return gpu.make_cases(gpu.parse_arguments(words))


def ok(tokens_per_second: float = 1000.0, **more: Any) -> dict[str, Any]:
    return {
        "status": "ok", "tokens_per_second": tokens_per_second, "tflops": 1.5, "mfu": None, "matmul_ratio": 0.5,
        "peak_memory_gib": 12.0, "num_microbatches": 4, "step_seconds": {"median": 0.25}, "clocks": {}, "losses": [3.0],
        "profile": None,
    } | more  # fmt: skip


def row(case: gpu.Case, result: dict[str, Any]) -> dict[str, Any]:
    return {"case": vars(case), "name": case.name, "precision": case.precision, **result}


# --- what is measured ---------------------------------------------------------------------------------------


def test_cases_two_precisions_and_sizes_come_as_a_product_in_rising_size():
    found = cases("--dtypes", "bf16", "fp8", "--micro_batch_sizes", "16", "8")
    assert [(c.precision, c.micro_batch_size) for c in found] == [
        ("bf16", 8), ("bf16", 16), ("fp8 tensorwise", 8), ("fp8 tensorwise", 16),
    ]  # fmt: skip


def test_cases_second_round_is_in_reverse_order():
    found = cases("--dtypes", "bf16", "fp8", "--micro_batch_sizes", "8", "--rounds", "2")
    assert [c.dtype for c in found] == ["bf16", "fp8", "fp8", "bf16"]


def test_cases_fp8_with_local_modules_is_left_out():
    found = cases("--impl", "local", "transformer_engine", "--dtypes", "fp8", "--micro_batch_sizes", "8")
    assert [c.implementation for c in found] == ["transformer_engine"]


def test_cases_nothing_left_is_refused():
    with pytest.raises(ConfigError, match="nothing is left"):
        cases("--impl", "local", "--dtypes", "fp8")


@pytest.mark.parametrize("word", ["0", "-1", "x", "1.5"])
def test_arguments_sizes_that_are_no_counts_are_refused(word, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_arguments(["--micro_batch_sizes", word])
    assert "must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "micro_batches"), [(8, 8), (16, 4), (24, 3), (32, 2), (1024, 1)])
def test_case_config_keeps_the_tokens_of_an_iteration(size, micro_batches):
    # 131,072 tokens are 64 samples of 2,048: what one of the eight GPUs does in an iteration of pints_1.5b_2k.
    (case,) = cases("--micro_batch_sizes", str(size))
    train = gpu.case_config(case).train
    assert (train.micro_batch_size, train.global_batch_size) == (size, size * micro_batches)


def test_case_config_takes_a_layout_for_eight_gpus_to_one_process():
    (case,) = cases("cpt_llama2_7b", "--micro_batch_sizes", "1")
    config = gpu.case_config(case)
    parallel = config.parallel
    assert parallel.tensor_model_parallel_size == parallel.pipeline_model_parallel_size == 1
    assert config.checkpoint.init_from is None


def test_case_config_longer_sequence_extends_the_model():
    (case,) = cases("--micro_batch_sizes", "1", "--seq_length", "16384")
    config = gpu.case_config(case)
    assert config.train.seq_length == config.model.max_position_embeddings == 16384


def test_case_config_applies_overrides():
    (case,) = cases("--micro_batch_sizes", "8", "--override", "model.num_layers", "3")
    assert gpu.case_config(case).model.num_layers == 3


def test_command_unknown_configuration_is_one_line_and_exit_code_two(capsys):
    assert gpu.main(["pints_9b"]) == EXIT_CODE
    error = capsys.readouterr().err
    assert error.startswith("error: pints_9b") and "Traceback" not in error


# --- the sweep ----------------------------------------------------------------------------------------------


def sweep(found: list[gpu.Case], outcomes: dict[tuple[str, int], str]) -> list[tuple[str, int, str]]:
    def run(case: gpu.Case) -> dict[str, Any]:
        return {"status": outcomes.get((case.dtype, case.micro_batch_size), "ok"), "reason": ""}

    return [(case.dtype, case.micro_batch_size, result["status"]) for case, result in gpu.run_sweep(found, run)]


def test_sweep_out_of_memory_leaves_out_larger_sizes_of_that_series_only():
    found = cases("--dtypes", "bf16", "fp8", "--micro_batch_sizes", "8", "16", "32")
    assert sweep(found, {("bf16", 16): "out_of_memory"}) == [
        ("bf16", 8, "ok"), ("bf16", 16, "out_of_memory"), ("bf16", 32, "not_run"),
        ("fp8", 8, "ok"), ("fp8", 16, "ok"), ("fp8", 32, "ok"),
    ]  # fmt: skip


def test_sweep_failure_does_not_end_it():
    found = cases("--micro_batch_sizes", "8", "16")
    assert [status for _, _, status in sweep(found, {("bf16", 8): "failed"})] == ["failed", "ok"]


def test_case_that_dies_becomes_a_failure_with_the_end_of_its_log(monkeypatch, tmp_path):
    program = tmp_path / "dies.py"
    program.write_text("print('first')\nraise RuntimeError('the kernel broke')\n")
    monkeypatch.setattr(gpu, "_MEASURE", program)
    result = gpu.run_case(cases("--device", "cpu", "--tiny")[0], timeout=60)
    assert result["status"] == "failed"
    assert result["reason"] == "RuntimeError: the kernel broke"
    assert result["log"][0] == "first"


def test_case_that_hangs_is_ended(monkeypatch, tmp_path):
    program = tmp_path / "hangs.py"
    program.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu, "_MEASURE", program)
    result = gpu.run_case(cases("--device", "cpu", "--tiny")[0], timeout=2)
    assert result["status"] == "timed_out"


# --- figures ------------------------------------------------------------------------------------------------


def event(name: str, start: float, duration: float, category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_kernel_summary_counts_simultaneous_kernels_once():
    # 0-100 and 50-150 overlap, 200-250 stands alone: 200 of 400 microseconds are busy.
    events = [event("a", 0, 100), event("b", 50, 100), event("c", 200, 50), event("x", 0, 400, "cpu_op"), {"ph": "M"}]
    summary = measure.kernel_summary(events, step_seconds=400e-6, on_gpu=True)
    assert summary["busy_seconds"] == pytest.approx(200e-6)
    assert summary["host_gap"] == pytest.approx(0.5)


def test_kernel_summary_ranks_kernels_by_their_sum():
    events = [event("short", 0, 10), event("long", 10, 15), event("short", 30, 10)]
    top = measure.kernel_summary(events, step_seconds=1e-4, on_gpu=True)["top"]
    assert [(r["name"], r["calls"]) for r in top] == [("short", 2), ("long", 1)]
    assert top[0]["milliseconds"] == pytest.approx(0.020)
    assert top[0]["share"] == pytest.approx(20 / 35)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTN", "matrix products"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel<Kernel_traits>", "norms"),
        ("void multi_tensor_apply_kernel<TensorListMetadata<1>, L2NormFunctor<float>>", "optimizer, clipping"),
        ("triton_poi_fused_cat_mul_silu_0", "compiled pointwise"),
        ("Memset (Device)", "copies, fills"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("something_else", "rest"),
    ],
)
def test_kind_of_kernel_follows_its_name(name, kind):
    assert measure.kind_of(name) == kind


def test_median_samples_leaves_out_lines_that_are_no_numbers():
    lines = ["1980, 690.5, 60", "1965, 700.0, 62", "1935, 701.0, 64", "[N/A], 1, 2", "19"]
    assert measure.median_samples(lines) == {"sm_mhz": 1965, "watts": 700.0, "celsius": 62}


def test_median_samples_without_a_sample_is_empty():
    assert measure.median_samples([]) == {}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("cuBLAS Error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_out_of_memory_is_told_from_other_failures(error, expected):
    assert measure.is_out_of_memory(error) is expected


def test_table_shows_figures_and_reasons_under_one_heading():
    small, large = cases("--micro_batch_sizes", "8", "16")
    drawn = gpu_report.table([
        row(small, ok(51_500.4, mfu=0.5)), row(large, {"status": "out_of_memory", "reason": "CUDA out of memory."})
    ]).splitlines()  # fmt: skip
    assert drawn[0].split()[:3] == ["implementation", "precision", "mbs"]
    assert "51,500" in drawn[1] and "50.0%" in drawn[1] and "250.0" in drawn[1]
    assert drawn[2].split() == ["transformer_engine", "bf16", "16", "out_of_memory:", "CUDA", "out", "of", "memory."]


def test_fp8_ratio_compares_the_best_of_each():
    found = cases("--dtypes", "bf16", "fp8", "--micro_batch_sizes", "8", "16")
    speeds = (40.0, 50.0, 65.0, 60.0)
    results = [row(case, ok(speed)) for case, speed in zip(found, speeds, strict=True)]
    assert gpu_report.fp8_ratio(results) == pytest.approx(65 / 50)


def test_fp8_ratio_without_fp8_is_none():
    assert gpu_report.fp8_ratio([row(case, ok()) for case in cases()]) is None


# --- the whole command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("bench")
    output = folder / "figures" / "gpu.json"
    words = ["--device", "cpu", "--tiny", "--steps", "3", "--warmup", "1", "--profile", str(folder / "traces")]
    code = gpu.main([*words, "--output", str(output)])
    return code, json.loads(output.read_text()), folder


def test_tiny_run_measures_what_the_formulas_say(tiny_run):
    code, report, _ = tiny_run
    (result,) = report["results"]
    assert code == 0 and result["status"] == "ok", result
    # One QKV of (2 + 2) x 64 rows, a projection, three MLP matrices, in 2 layers; 512 output rows; 64 positions.
    linear = 6 * (2 * (128 * (256 + 128) + 3 * 128 * 256) + 512 * 128)
    attention = 6 * 2 * 64 * 128
    assert result["flops_per_token"] == {"linear": linear, "attention": attention}
    assert result["tokens_per_step"] == 2 * 2 * 64
    assert len(result["seconds"]) == len(result["losses"]) == 3
    rate = result["tokens_per_step"] / sorted(result["seconds"])[1]
    assert result["tokens_per_second"] == pytest.approx(rate)
    assert result["tflops"] == pytest.approx(rate * (linear + attention) / 1e12)


def test_tiny_run_trains_the_real_model_on_random_tokens(tiny_run):
    (result,) = tiny_run[1]["results"]
    # Random tokens of 512: a model that has not learnt them by heart stays near ln 512.
    assert all(abs(loss - math.log(512)) < 0.5 for loss in result["losses"])
    assert result["losses"][0] != result["losses"][1]


def test_tiny_run_records_command_date_and_versions(tiny_run):
    _, report, _ = tiny_run
    assert report["command"][:2] == ["python", "bench/gpu.py"] and "--tiny" in report["command"]
    assert report["date"].endswith("+00:00") and report["code_revision"]
    machine = report["results"][0]["machine"]
    assert machine["device"] == "CPU" and {"torch", "megatron-core", "python"} <= machine.keys()


def test_tiny_run_claims_no_mfu_and_no_ratio_on_a_cpu(tiny_run):
    (result,) = tiny_run[1]["results"]
    assert result["mfu"] is result["matmul_ratio"] is result["peak_memory_gib"] is None


def test_tiny_run_writes_a_trace_that_opens(tiny_run):
    (result,) = tiny_run[1]["results"]
    trace = Path(result["profile"]["trace"])
    assert trace.parent == tiny_run[2] / "traces"
    with gzip.open(trace, "rt") as stream:
        assert json.load(stream)["traceEvents"]
    assert result["profile"]["host_gap"] is None
    assert any("mm" in entry["name"] for entry in result["profile"]["top"])


def test_transformer_engine_without_a_device_is_refused_in_one_line():
    (case,) = cases("--tiny")
    hidden = gpu.run_case(vars_replaced(case, device="cpu", implementation="transformer_engine"), timeout=120)
    assert hidden["status"] == "refused"
    assert "transformer_engine" in hidden["reason"] and "needs a CUDA device" in hidden["reason"]


def vars_replaced(case: gpu.Case, **changes: Any) -> gpu.Case:
    return gpu.Case(**{**vars(case), **changes})
