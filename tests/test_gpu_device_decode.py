"""What the machine of gpu_shim/ shows of decode.cu and merge.cu, shown on a GPU: the tests of test_gpu_decode.py.

Those of planted bugs and of machine code stay there.
"""
import gpu_on_device
import pytest
import test_gpu_decode

pytestmark = pytest.mark.gpu
OF_THE_MACHINE = ("test_bug_is_caught", "test_no_spills", "test_no_spills_at_all", "test_opcodes", "test_not_chosen",
                  "test_chunks_depend_on_keys_and_head_dim_only")

globals().update({name: x for name, x in vars(test_gpu_decode).items()
                  if (name.startswith("test_") and name not in OF_THE_MACHINE) or name == "kind"})


@pytest.fixture(autouse=True)
def device(monkeypatch):
    gpu_on_device.use(monkeypatch)
