"""The primitives on the machine of gpu_shim/ against NumPy; and that the same source compiles for GPUs."""
import gpu_on_device
import gpu_primitives
import pytest
from gpu_primitives import HOPPER_PRIMITIVES, PRIMITIVES
from gpu_running import EARLY, LATE, MIXED

from cyflash.gpu import build


@pytest.mark.parametrize("name", [*PRIMITIVES, *HOPPER_PRIMITIVES])
def test_shim(name):
    one = (PRIMITIVES | HOPPER_PRIMITIVES)[name]()
    for schedule in (EARLY, LATE, MIXED):
        one.check(one.run(schedule=schedule))


def test_a_difference_is_seen():
    one = gpu_primitives.matrices()
    found = one.run()
    found[3, 5] ^= 1
    with pytest.raises(AssertionError, match=r"load_matrices_transposed: 1 of 128 differ: \[13\] 0x"):
        one.check(found)


def test_looking_for_a_descriptor_finds_the_right_one():
    found = gpu_primitives.descriptors_that_work(gpu_primitives.Wide("f16", 128, 64, 128, True, True))
    assert found == ["leading 8192, stride 1024, swizzle 128 bytes"]
    found = gpu_primitives.descriptors_that_work(gpu_primitives.Wide("s8", 64, 64, 64, False))
    assert "leading 16, stride 512, swizzle 64 bytes for both operands" in found
    assert all("stride 512, swizzle" in name for name in found)
    for case in gpu_primitives.WIDE:
        right = (case.depth if case.turned else 1) * case.pitch if case.turned else 16
        assert any(f"leading {right}, stride {8 * case.pitch}," in name for name in gpu_primitives.descriptors(case))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_compiles(name):
    for arch in ("sm_80", "sm_90a"):
        variant = PRIMITIVES[name]().variant(arch)
        assert build.build(variant, gpu_on_device.own_texts(variant)).cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", HOPPER_PRIMITIVES)
def test_compiles_for_hopper(name):
    variant = HOPPER_PRIMITIVES[name]().variant()
    built = build.build(variant, gpu_on_device.own_texts(variant))
    assert "C75" not in built.log and " 0 bytes spill stores" in built.log
