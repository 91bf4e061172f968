"""`cyflash bench --gpu`: what it says where there is no GPU, and a run on a fake one."""
import json

import gpu_fake
import pytest

import cyflash
from cyflash import cli
from cyflash.bench import gpu, gpu_systems
from cyflash.bench.gpu_systems import GPUCase

SMALL = (
    GPUCase("fp16", 1, 4, 2, 20, 20, 8, causal=True), GPUCase("int8", 1, 2, 2, 20, 24, 8),
    GPUCase("int8 qk", 1, 2, 2, 20, 24, 8, quantise=True), GPUCase("fp32", 2, 2, 2, 1, 40, 8),
)  # fmt: skip


def test_without_a_gpu(monkeypatch, capsys):
    absent = cyflash.gpu.status.GPUStatus(False, "no NVIDIA driver was found")
    monkeypatch.setattr(cyflash, "gpu_status", lambda: absent)
    assert cli.main(["bench", "--gpu"]) == 2
    shown = capsys.readouterr()
    assert "--gpu: there is no GPU to measure on: no NVIDIA driver was found" in shown.err and not shown.out


@pytest.fixture
def device(monkeypatch):
    fake = gpu_fake.device(monkeypatch)
    monkeypatch.setattr(gpu, "CASES", SMALL)
    monkeypatch.setattr(gpu, "copy_rate", lambda: 4e12)

    def absent():
        raise gpu_systems.Absent("torch is not installed")

    monkeypatch.setattr(gpu_systems, "_torch", absent)
    return fake


def test_a_run(device, capsys, tmp_path):
    assert cli.main(["bench", "--gpu", "--rounds", "2", "--json", str(tmp_path / "gpu.json")]) == 0
    shown = capsys.readouterr().out
    assert "a copy moves 4000 GB/s" in shown and "torch is not installed" in shown
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["gpu"]["device"] == "Fake" and len(found["results"]) == len(SMALL)
    for result in found["results"]:
        assert result["seconds"]["cyflash"] > 0 and result["errors"]["cyflash"] < 0.05
    assert {one.variant.kernel for one in device.launches} == {
        "float16_float16_float16", "int8_int8_float32", "int8_float16_float16", "float32_float32_float32",
    }  # fmt: skip


def test_a_wrong_kernel_is_not_timed(device, capsys, monkeypatch):
    right = gpu_systems.of_cyflash
    monkeypatch.setitem(gpu.SYSTEMS, "cyflash", lambda case, q, k, v: right(case, q, k, k))
    assert cli.main(["bench", "--gpu", "--rounds", "1"]) == 1
    assert "wrong: off by" in capsys.readouterr().out


@pytest.mark.parametrize("more", [["--causal"], ["--systems", "numpy"], ["--shapes", "1,1,8,8"]])
def test_bad_arguments(device, more, capsys):
    assert cli.main(["bench", "--gpu", *more]) == 2
    assert "--gpu measures a fixed list" in (err := capsys.readouterr().err) or "--systems: expected names" in err
