"""Which device and number format is taken, with the machine played by the test."""

import pytest
import torch

from vlm.common.errors import UsageError, is_out_of_memory
from vlm.machine import device
from vlm.machine.device import pick_device, pick_dtype


def machine(monkeypatch, cuda=False, mps=False, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("has", "wanted", "taken"),
    [
        ({}, "auto", "cpu"),
        ({"cuda": True}, "auto", "cuda"),
        ({"mps": True}, "auto", "cpu"),
        ({"mps": True}, "mps", "mps"),
    ]
    + [({"cuda": True}, "cpu", "cpu"), ({"cuda": True}, "cuda", "cuda")],
)
def test_devices(monkeypatch, has, wanted, taken):
    machine(monkeypatch, **has)
    assert pick_device(wanted)[0].type == taken


def test_on_apple_silicon_a_line_says_that_mps_exists(monkeypatch):
    machine(monkeypatch, mps=True)
    assert "--device mps" in pick_device("auto")[1]


@pytest.mark.parametrize("wanted", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_refused(monkeypatch, wanted):
    machine(monkeypatch)
    with pytest.raises(UsageError, match=f"--device {wanted}.*--device auto"):
        pick_device(wanted)


@pytest.mark.parametrize(
    ("kind", "capability", "wanted", "dtype"),
    [
        ("cpu", (9, 0), "auto", torch.float32),
        ("mps", (9, 0), "auto", torch.float32),
        ("cuda", (9, 0), "auto", torch.bfloat16),
        ("cuda", (7, 5), "auto", torch.float32),
        ("cuda", (7, 5), "float16", torch.float16),
        ("cpu", (9, 0), "bfloat16", torch.bfloat16),
    ],
)
def test_number_formats(monkeypatch, kind, capability, wanted, dtype):
    machine(monkeypatch, capability=capability)
    assert pick_dtype(wanted, torch.device(kind)) == dtype


def test_float16_needs_cuda():
    with pytest.raises(UsageError, match="float16 works on CUDA only"):
        pick_dtype("float16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated ...)"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, memory):
    assert is_out_of_memory(error) is memory


def test_threads_are_those_asked_for_else_a_share_of_the_cores_that_may_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(device.psutil, "cpu_count", lambda logical: 8)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.setattr(device, "cores_of_container", lambda: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert (device.pick_threads(5), device.pick_threads(None)) == (5, 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # by accelerate launch, and the user had said nothing
    monkeypatch.setenv("VLM_OMP_NUM_THREADS", "")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.pick_threads(None) == device.share_of_cores() == 4
    monkeypatch.setattr(device, "cores_of_container", lambda: 3)
    assert device.share_of_cores() == 1


@pytest.mark.parametrize(
    ("text", "cores"), [("250000 100000", 3), ("100000 100000", 1), ("max 100000", None), (None, None)]
)
def test_a_container_may_be_allowed_less_than_it_sees(tmp_path, text, cores):
    if text:
        (tmp_path / "cpu.max").write_text(text + "\n")
    assert device.cores_of_container(tmp_path / "cpu.max") == cores
