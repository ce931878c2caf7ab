"""What is known of a device: its peak, and nothing where it is not known."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.parallel import device

CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without CUDA does")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        # NVIDIA's data sheets, dense bf16 (half of the figure "with sparsity").
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
    ],
)
def test_peak_of_a_known_device_is_its_data_sheets(name, peak, monkeypatch):
    monkeypatch.setattr(device, "name", lambda: name)
    assert device.peak_bf16_tflops() == peak


@pytest.mark.parametrize("name", ["CPU", "NVIDIA GeForce RTX 4090", "NVIDIA H20", "NVIDIA H800", "Tesla V100-SXM2"])
def test_peak_of_another_device_is_not_known(name, monkeypatch):
    monkeypatch.setattr(device, "name", lambda: name)
    assert device.peak_bf16_tflops() is None


@CPU_ONLY
def test_machine_without_cuda_computes_on_the_cpu():
    assert (device.current(), device.backend(), device.name()) == (torch.device("cpu"), "gloo", "CPU")


@CPU_ONLY
def test_machine_without_cuda_has_no_transformer_engine():
    assert not device.has_transformer_engine()


@CPU_ONLY
def test_machine_without_cuda_reports_no_device_memory():
    assert device.peak_memory_gib() is None


@CPU_ONLY
def test_state_of_another_kind_of_device_is_left_aside():
    before = torch.get_rng_state()
    device.set_rng_state({"cuda": torch.zeros(16, dtype=torch.uint8)})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("deterministic", [True, False])
def test_torch_is_told_which_algorithms_to_choose(deterministic):
    try:
        device.choose_algorithms(deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled() is deterministic
    finally:
        torch.use_deterministic_algorithms(False)
