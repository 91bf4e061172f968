"""`cyflash bench --gpu`: what it says where there is no GPU, and a run on a fake one."""
import json
import os
import subprocess
import sys

import gpu_fake
import pytest

import cyflash
from cyflash import cli
from cyflash.bench import gpu, gpu_systems, gpu_worker
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


def in_this_process(request, limit):
    lines = []
    gpu_worker.serve(request, lambda line: lines.append(json.loads(json.dumps(line))))
    return lines, None


@pytest.fixture
def device(monkeypatch):
    fake = gpu_fake.device(monkeypatch)
    monkeypatch.setattr(gpu, "CASES", SMALL)
    monkeypatch.setattr(gpu_worker, "ceilings", lambda: {"copy": 4e12, "fp32": 67e12})
    monkeypatch.setattr(gpu, "ask", in_this_process)

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
    right = gpu_systems.OfCyflash
    monkeypatch.setitem(gpu_worker.SYSTEMS, "cyflash", lambda case, q, k, v: right(case, q, k, k))
    assert cli.main(["bench", "--gpu", "--rounds", "1"]) == 1
    assert "wrong: off by" in capsys.readouterr().out


WORKERS = {  # what a process may do when its turn comes to time the second system
    "crashes": "import os; os.abort()", "hangs": "import time; time.sleep(60)",
    "raises": "raise OSError('no such thing')",
}
WORKER = """
import json, sys
request = json.loads(sys.argv[1])
def tell(line): print("@ " + json.dumps(line), flush=True)
for name in request["names"]:
    tell({"now": name})
    if name == "torch flash":
        WHAT
    tell({"ready": name, "error": 0.0, "kernel": "a kernel" if name == "cyflash" else None})
tell({"seconds": {name: [3.0, 1.0, 2.0] for name in request["names"]}})
"""


@pytest.mark.parametrize("what", WORKERS)
def test_a_crash_costs_one_system(monkeypatch, what):
    monkeypatch.setattr(gpu, "WORKER", ("-c", WORKER.replace("WHAT", WORKERS[what])))
    found = gpu.measure(SMALL[0], ["cyflash", "torch flash", "Triton"], 1, 1, limit=5)
    assert found["seconds"] == {"cyflash": 2.0, "Triton": 2.0} and found["kernels"] == {"cyflash": "a kernel"}
    assert set(found["failures"]) == {"torch flash"} and not gpu.fails(found)
    why = {"crashes": "ended its process with status -6", "hangs": "did not end in 5 s", "raises": "no such thing"}
    assert why[what] in found["failures"]["torch flash"]


def test_a_process_that_says_nothing(monkeypatch):
    monkeypatch.setattr(gpu, "WORKER", ("-c", "raise SystemExit(3)"))
    found = gpu.measure(SMALL[0], ["cyflash", "Triton"], 1, 1, limit=60)
    assert not found["seconds"] and set(found["failures"]) == {"cyflash", "Triton"} and gpu.fails(found)
    assert gpu.ceilings() == {}


def test_repeated_sequences():
    assert [GPUCase("fp16", B, 1, 1, 1, 1, 8).repeats() for B in (1, 2, 4, 6, 8, 64)] == [1, 1, 1, 1, 2, 16]


def test_kernels_can_be_left_out():
    from cyflash.gpu import variants

    def chosen():
        return variants.choose("sm_90a", 128, "float16", mapped=True).source

    assert chosen() == "hopper.cu"
    with gpu_systems.without("hopper.cu"):
        assert chosen() == "mma.cu"
    assert chosen() == "hopper.cu"


TRITON = """
import torch
from cyflash.bench import gpu_triton
for causal in (False, True):
    for H, Hk, Lq, Lk in ((2, 1, 70, 133), (2, 2, 64, 64), (1, 1, 1, 90)):
        q, k, v = (torch.randn(2, h, L, 16).half() for h, L in ((H, Lq), (Hk, Lk), (Hk, Lk)))
        found = gpu_triton.attention(q, k, v, causal=causal, tiles={"BLOCK_M": 32, "BLOCK_N": 32})
        s = q.double() @ k.repeat_interleave(H // Hk, 1).double().mT / 4
        s = s.masked_fill(~torch.ones(Lq, Lk).tril(Lk - Lq).bool(), float("-inf")) if causal else s
        assert (found - s.softmax(-1) @ v.repeat_interleave(H // Hk, 1).double()).abs().max() < 2e-3
"""


def test_triton():
    """The peer in Triton, by Triton's interpreter."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", TRITON], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


@pytest.mark.parametrize("more", [["--causal"], ["--systems", "numpy"], ["--shapes", "1,1,8,8"]])
def test_bad_arguments(device, more, capsys):
    assert cli.main(["bench", "--gpu", *more]) == 2
    assert "--gpu measures a fixed list" in (err := capsys.readouterr().err) or "--systems: expected names" in err
