"""Kernels run where they were proven or asked for, and say why where they cannot."""

import subprocess
import sys
import threading

import pytest
import torch

from moeadapt import kernels
from moeadapt.errors import UnsupportedError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that pretends a GPU of some compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(kernels, "find_spec", lambda name: object())
        monkeypatch.setattr(kernels, "_capability", lambda device: capability)

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return pretend


class _OnCuda(torch.Tensor):
    device, is_cuda = CUDA, True


TENSOR = torch.zeros(1).as_subclass(_OnCuda)
"""Says that it is on a GPU."""


@pytest.mark.parametrize(
    "module", ["moeadapt", "moeadapt.kernels.mix_activation", "moeadapt.kernels.top_k_gate"]
)
def test_importing_does_not_import_triton(module):
    probe = f"import sys, {module}; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_without_triton_the_reason_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert "pip install 'moeadapt[kernels]'" in (kernels.unavailable(CUDA) or "")


def test_a_cpu_cannot_run_them(gpu):
    gpu((9, 0))
    assert "the device is cpu" in (kernels.unavailable(CPU) or "")


def test_a_cpu_can_interpret_them(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.unavailable(CPU) is None


def test_no_cuda_device_is_a_reason(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.unavailable(CUDA) == "torch sees no CUDA device"


def test_an_amd_gpu_is_a_reason(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA GPUs only" in (kernels.unavailable(CUDA) or "")


@pytest.mark.parametrize(("capability", "can"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_old_gpus_cannot_run_them(gpu, capability, can):
    gpu(capability)
    reason = kernels.unavailable(CUDA)
    assert (reason is None) == can
    assert can or reason == "they need compute capability 8.0, and cuda:0 has 7.5"


def test_nothing_is_used_unless_proven(gpu, monkeypatch):
    gpu((9, 0))
    assert not kernels.use("mix_activation", TENSOR)
    monkeypatch.setattr(kernels, "PROVEN", frozenset({("mix_activation", (9, 0))}))
    assert kernels.use("mix_activation", TENSOR)
    assert not kernels.use("top_k_gate", TENSOR)
    assert not kernels.use("mix_activation", torch.zeros(1))
    gpu((8, 0))
    assert not kernels.use("mix_activation", TENSOR)


def test_what_is_proven_is_not_used_where_it_cannot_run(gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(kernels, "PROVEN", frozenset({("mix_activation", (9, 0))}))
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    assert not kernels.use("mix_activation", TENSOR)


def test_what_is_asked_for_is_used_in_the_block_only(gpu):
    gpu((9, 0))
    with kernels.enabled():
        with kernels.enabled():
            assert kernels.use("top_k_gate", TENSOR)
        assert kernels.use("mix_activation", TENSOR)
    assert not kernels.use("mix_activation", TENSOR)


def test_asking_counts_in_the_threads_of_backward(gpu):
    gpu((9, 0))
    found = []
    with kernels.enabled():
        thread = threading.Thread(target=lambda: found.append(kernels.use("top_k_gate", TENSOR)))
        thread.start()
        thread.join()
    assert found == [True]


def test_asking_is_refused_where_they_cannot_run(gpu):
    gpu((7, 5))
    with (
        pytest.raises(UnsupportedError, match="need compute capability 8.0"),
        kernels.enabled(),
    ):
        raise AssertionError("the block must not run")
    assert not kernels.use("mix_activation", TENSOR)


def test_an_error_in_the_block_ends_it(gpu):
    gpu((9, 0))
    with pytest.raises(ValueError, match="mine"), kernels.enabled():
        raise ValueError("mine")
    assert not kernels.use("mix_activation", TENSOR)


def test_a_tensor_elsewhere_is_refused_when_asked_for(gpu):
    gpu((9, 0))
    with (
        kernels.enabled(),
        pytest.raises(UnsupportedError, match="the device is cpu; leave out"),
    ):
        kernels.use("mix_activation", torch.zeros(1))


def test_no_kernel_is_proven_before_it_was_measured():
    """An entry comes with its rows in benchmarks/results, and then changes this test."""
    assert frozenset() == kernels.PROVEN
