"""What the machine offers, and what follows from it."""

import pytest
import torch

from vpd import device
from vpd.config import ConfigError, ModelSettings
from vpd.device import (
    autocasts,
    computes_bfloat16,
    default_kernel,
    is_cpu,
    is_cuda,
    memory_bytes,
    optimises_layers,
    packed_kernel,
    peak_memory_bytes,
    training_device,
    usable_cores,
)

CPU, CUDA, META = map(torch.device, ("cpu", "cuda", "meta"))


def test_the_peak_is_in_bytes_and_never_falls():
    before = peak_memory_bytes()
    held = bytearray(64 << 20)
    during = peak_memory_bytes()
    assert before > 10 << 20
    assert during >= before
    del held
    assert peak_memory_bytes() >= during


def test_the_machine_has_memory_and_cores():
    assert (memory_bytes(CPU) or 0) > peak_memory_bytes()
    assert usable_cores() >= 1


def test_devices_and_tensors_are_told_apart():
    assert is_cpu(CPU)
    assert is_cpu(torch.ones(1))
    assert is_cuda(torch.device("cuda:1"))
    assert not is_cuda(CPU)
    assert not is_cpu(torch.ones(1, device="meta"))
    assert not is_cuda(META)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_run_trains_on_a_gpu_where_there_is_one(monkeypatch, has_gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert training_device() == (CUDA if has_gpu else CPU)


def test_kernels_follow_the_device_unless_one_is_chosen():
    assert default_kernel(CUDA) == packed_kernel(ModelSettings(), CUDA) == "flex"
    assert default_kernel(CPU) == packed_kernel(ModelSettings(), CPU) == "blocks"
    assert default_kernel(META) == "blocks"
    assert packed_kernel(ModelSettings(packed_attention="blocks"), CUDA) == "blocks"
    assert packed_kernel(ModelSettings(packed_attention="flex"), CUDA) == "flex"
    with pytest.raises(ConfigError, match='take "blocks" or "auto"'):
        packed_kernel(ModelSettings(packed_attention="flex"), CPU)


@pytest.mark.parametrize("is_native", [True, False])
def test_bfloat16_is_taken_where_it_is_native_or_asked_for(monkeypatch, is_native):
    monkeypatch.setattr(device, "multiplies_bfloat16", lambda: is_native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: is_native)
    assert computes_bfloat16(CPU) is computes_bfloat16(CUDA) is is_native
    assert not computes_bfloat16(META)
    assert autocasts(ModelSettings(), CPU) is is_native
    assert autocasts(ModelSettings(autocast="bfloat16"), CPU)
    assert not autocasts(ModelSettings(autocast="none"), CPU)
    assert not autocasts(ModelSettings(autocast="bfloat16", dtype="bfloat16"), CPU), "the weights are bfloat16 already"


@pytest.mark.parametrize("has_accelerator", [True, False])
def test_layers_are_optimised_where_there_is_no_accelerator_unless_told_not_to(monkeypatch, has_accelerator):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    assert optimises_layers(ModelSettings()) is not has_accelerator
    assert not optimises_layers(ModelSettings(fused_layers=False))


@pytest.mark.parametrize("stays", ["true", "1", "yes"])
def test_what_keeps_accelerate_on_the_cpu_keeps_everything_there(monkeypatch, stays):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    assert device.training_device().type == "cuda"
    assert not device.optimises_layers(ModelSettings())
    monkeypatch.setenv("ACCELERATE_USE_CPU", stays)
    assert device.training_device().type == "cpu"
    assert device.optimises_layers(ModelSettings())
    assert device.packed_kernel(ModelSettings(), device.training_device()) == "blocks"
