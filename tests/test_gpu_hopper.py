"""The kernel for compute capability 9.0 on the machine of gpu_shim/, against float64; and what the compiler makes of it."""
import gpu_compiling
import gpu_running
import numpy as np
import pytest
from gpu_running import EARLY, LATE, MIXED

from cyflash import reference
from cyflash.gpu import variants

SCHEDULES = {"early": EARLY, "late": LATE, "mixed": MIXED}
ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def arrays(rng, B, H, Hk, Lq, Lk, D, dtype="float16"):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return [rng.standard_normal(shape).astype(dtype) for shape in ((B, H, Lq, D), (B, Hk, Lk, D), (B, Hk, Lk, D))]


def require_close(result, q, k, v, **options):
    """Weights and the output are rounded once each to 16 bits: at most 2 roundings of sum |p v| <= max |v|."""
    out, lse = reference.attention(*(x.astype(np.float32) for x in (q, k, v)), return_lse=True, **options)
    values = v.astype(np.float32)
    largest = np.abs(values[np.isfinite(values)]).max(initial=0)
    np.testing.assert_allclose(result.out.astype(np.float32), out, rtol=0, atol=2.5 * ROUNDING[q.dtype.name] * largest)
    np.testing.assert_allclose(result.lse, lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64, 128, 128), (1, 2, 1, 130, 300, 128), (2, 2, 1, 33, 517, 64), (1, 1, 1, 70, 200, 256)])
def test_shapes(schedule, shape):
    q, k, v = arrays(np.random.default_rng(0), *shape)
    require_close(gpu_running.run(q, k, v, schedule=schedule, arch="sm_90a"), q, k, v)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_compiled(D):
    compiled = gpu_compiling.compiled(variants.choose("sm_90a", D, "float16", mapped=True))
    assert compiled.spilled == 0
    assert "C75" not in compiled.log  # registers that stay, products in series
    assert compiled.registers == 168  # 65536 / 384 rounded down to 8: before warpgroups exchange them
    found = " ".join(gpu_compiling.opcodes(compiled.cubin))
    for name in ("HGMMA", "UTMALDG.4D", "SYNCS.PHASECHK", "SYNCS.ARRIVE", "USETMAXREG"):
        assert name in found
    assert "HMMA" not in found.split()
