"""The systems that are timed: one class each, configured at its best, with its own control of threads.

Each lives alone in a fresh process (worker.py). Where a system can be asked in several ways, every way is a candidate
and the worker keeps the fastest for the case at hand; where its interface allows, outputs go into one ready array.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from cyflash.bench.cases import BF16, FP32, TOLERANCES


@dataclass
class Candidate:
    """`call` is what is timed; `read` turns its result into (B, H, L, D), untimed; `note` says what the system made."""

    call: Callable[[], object]
    read: Callable[[object], np.ndarray]
    note: str = ""
    keep: tuple = field(default=(), repr=False)  # what must live as long as the call
    seconds: Callable[[], float] | None = None  # of the last call, where only a part of it counts


class System:
    """`needs`: the modules it imports; the first is the distribution whose version is shown."""

    name = ""
    needs: tuple[str, ...] = ()

    def __init__(self, threads):
        self.asked = threads

    @classmethod
    def missing(cls):
        """Why it cannot run here, or None."""
        absent = [module for module in cls.needs if importlib.util.find_spec(module) is None]
        return f"{' and '.join(absent)} not installed" if absent else None

    def version(self):
        return importlib.metadata.version(self.needs[0])

    def threads(self):
        """The thread count that the system itself reports; None when it has no way to tell."""
        return None

    def settings(self):
        return {}

    @classmethod
    def tolerance(cls, case):
        """What its output may lose."""
        return FP32

    def candidates(self, case):
        """{name: function that builds a Candidate}."""
        raise NotImplementedError


class Cyflash(System):
    name = "cyflash"

    def version(self):
        return importlib.metadata.version("cyflash-attn")

    def threads(self):
        import cyflash

        return cyflash.cpu_info()["threads"]

    def settings(self):
        import cyflash

        info = cyflash.cpu_info()
        return {"implementation": info["implementation"], "openmp": info["openmp"]}

    @classmethod
    def tolerance(cls, case):
        return TOLERANCES[case.dtype] if case.int8 is None else case.int8.tolerance()

    def candidates(self, case):
        from cyflash import flash_attention, flash_attention_int8
        from cyflash.arrays import checked_dtype

        def build():
            q, k, v = (x.astype(checked_dtype("dtype", case.dtype), copy=False) for x in case.inputs())
            keywords = {name: value for name, value in case.keywords().items() if value is not None}
            if case.reuse_out:
                keywords["out"] = np.empty_like(q)
            if case.num_threads is not None:
                keywords["num_threads"] = case.num_threads
            if case.int8 is None:
                return Candidate(lambda: flash_attention(q, k, v, **keywords), np.array)
            q, k, v, options = _int8_arguments(case.int8, q, k, v)
            return Candidate(lambda: flash_attention_int8(q, k, v, **options, **keywords), np.array)

        return {"flash_attention" if case.int8 is None else "flash_attention_int8": build}

    def fma_rate(self, seconds):
        """FLOP/s of one thread that does nothing but fused multiply-adds, in the build that is in use."""
        from cyflash import cpu

        return cpu.active().fma_rate(seconds)

    def dot_rate(self, seconds):
        """OP/s of one thread that does nothing but dot products of codes, in the build that is in use."""
        from cyflash import cpu

        return cpu.active().dot_rate(seconds)


def _int8_arguments(int8, q, k, v):
    """(q, k, v, options of `flash_attention_int8`); arrays that come as codes leave only pv to the call."""
    from cyflash.quantized import quantize

    options = {"granularity": int8.granularity, "smooth_k": int8.smooth_k, "pv": int8.pv}
    if int8.quantised:
        q, v = (quantize(x, int8.granularity) for x in (q, v))
        k = quantize(k, int8.granularity, smooth=bool(int8.smooth_k))
        del options["granularity"], options["smooth_k"]
    return q, k, v, {name: value for name, value in options.items() if value is not None}


class NumPy(System):
    """The formula with the whole score array, as a careful NumPy user would write it (plain.py)."""

    name = "numpy"
    needs = ("numpy",)

    def threads(self):
        return max((pool["num_threads"] for pool in self._pools()), default=None)

    def settings(self):
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        kernels = {pool["architecture"] for pool in self._pools() if "architecture" in pool}
        return {"blas": f"{blas['name']} {blas['version']}", "kernels": ", ".join(sorted(kernels)) or "unknown"}

    def _pools(self):
        from threadpoolctl import threadpool_info

        return [pool for pool in threadpool_info() if pool["user_api"] == "blas"]

    def candidates(self, case):
        from cyflash.plain import plain_attention

        def build():
            q, k, v = case.inputs()
            return Candidate(lambda: plain_attention(q, k, v, causal=case.causal), np.asarray)

        return {"plain_attention": build}


class Torch(System):
    """scaled_dot_product_attention with every backend but flash switched off: torch raises rather than fall back."""

    name = "torch"
    needs = ("torch",)

    def __init__(self, threads):
        super().__init__(threads)
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch.set_num_threads(threads)
        torch.set_num_interop_threads(1)
        torch.set_float32_matmul_precision("highest")
        self._modes = torch.inference_mode(), sdpa_kernel([SDPBackend.FLASH_ATTENTION])
        for mode in self._modes:  # for the life of the process
            mode.__enter__()

    def threads(self):
        import torch

        return torch.get_num_threads()

    def settings(self):
        import torch

        return {"simd": torch.backends.cpu.get_cpu_capability(), "backend": "SDPBackend.FLASH_ATTENTION"}

    def candidates(self, case):
        import torch

        def build():
            q, k, v = (torch.from_numpy(x) for x in case.inputs())
            attend = torch.nn.functional.scaled_dot_product_attention
            return Candidate(lambda: attend(q, k, v, is_causal=case.causal), lambda result: result.numpy())

        return {"SDPA flash": build}


class OnnxRuntime(System):
    """One-node models through I/O binding. Which node is fastest depends on the shape: MultiHeadAttention has the flash
    kernel, but takes and gives (B, L, H * D), which it transposes; GroupQueryAttention skips the causal half."""

    name = "onnxruntime"
    needs = ("onnxruntime", "onnx")

    def __init__(self, threads):
        super().__init__(threads)
        import onnxruntime

        onnxruntime.set_default_logger_severity(3)
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads
        self._options.inter_op_num_threads = 1
        # Its threads spin while a call runs, as they do by default, but not while other systems have their turn.
        self._options.add_session_config_entry("session.force_spinning_stop", "1")

    def threads(self):
        return self._options.intra_op_num_threads

    def settings(self):
        return {"provider": "CPUExecutionProvider", "force_spinning_stop": "1"}

    def candidates(self, case):
        H = case.shape[1]
        microsoft = {"domain": "com.microsoft", "num_heads": H}
        if not case.causal:
            return {
                "MultiHeadAttention": lambda: self._build(case, "MultiHeadAttention", "blhd", microsoft),
                "Attention-23": lambda: self._build(case, "Attention", "bhld", {}),
            }
        grouped = microsoft | {"kv_num_heads": H}
        causal = microsoft | {"unidirectional": 1}
        return {
            "MultiHeadAttention": lambda: self._build(case, "MultiHeadAttention", "blhd", causal),
            "GroupQueryAttention": lambda: self._build(case, "GroupQueryAttention", "blhd", grouped),
            "Attention-23": lambda: self._build(case, "Attention", "bhld", {"is_causal": 1}),
        }

    def _build(self, case, operator, layout, attributes):
        B, H, L, D = case.shape
        inputs = dict(zip("qkv", case.inputs(), strict=True))
        if layout == "blhd":
            inputs = {name: x.transpose(0, 2, 1, 3).reshape(B, L, H * D) for name, x in inputs.items()}
            inputs = {name: np.ascontiguousarray(x) for name, x in inputs.items()}  # a reshape of one head is a view
        outputs = {"out": np.empty_like(inputs["q"])}
        names = list(inputs)
        if operator == "GroupQueryAttention":  # it also gives the keys and values as its cache holds them
            names += ["", "", "last", "total"]
            inputs |= {"last": np.full(B, L - 1, np.int32), "total": np.array([L], np.int32)}
            outputs |= {name: np.empty((B, H, L, D), np.float32) for name in ("cache_k", "cache_v")}
        session = self._session(operator, names, inputs, outputs, attributes)
        binding = session.io_binding()
        for name, x in inputs.items():
            binding.bind_cpu_input(name, x)
        for name, x in outputs.items():
            binding.bind_output(name, "cpu", 0, np.float32, x.shape, x.ctypes.data)
        out = outputs["out"] if layout == "bhld" else outputs["out"].reshape(B, L, H, D).transpose(0, 2, 1, 3)
        return Candidate(lambda: session.run_with_iobinding(binding), lambda _: out.copy(), layout, (inputs, outputs))

    def _session(self, operator, names, inputs, outputs, attributes):
        import onnxruntime
        from onnx import helper

        def values(arrays):
            return [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
                for name, x in arrays.items()
            ]

        node = helper.make_node(operator, names, list(outputs), **attributes)
        graph = helper.make_graph([node], "attention", values(inputs), values(outputs))
        versions = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=11)
        return onnxruntime.InferenceSession(model.SerializeToString(), self._options, ["CPUExecutionProvider"])


class OpenVINO(System):
    """A model of static shape, compiled for latency in one stream. Its compiler fuses attention into one kernel, be it
    the ScaledDotProductAttention operation or the products and the softmax spelled out, which often is faster."""

    name = "openvino"
    needs = ("openvino",)
    precision = "f32"
    formats: tuple[str, ...] = ("f32",)  # of the arrays in and out

    def __init__(self, threads):
        super().__init__(threads)
        self._reported = None
        self._config = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,  # no other system pins its threads
        }

    def threads(self):
        return self._reported

    def settings(self):
        return self._config

    def candidates(self, case):
        graphs = {"ScaledDotProductAttention": self._fused_operation, "MatMul-Softmax-MatMul": self._spelled_out}
        return {
            name + f", {array} arrays" * (len(self.formats) > 1): partial(self._build, case, graph, array)
            for name, graph in graphs.items()
            for array in self.formats
        }

    def _fused_operation(self, case, q, k, v):
        from openvino import opset13 as op

        return op.scaled_dot_product_attention(q, k, v, causal=case.causal)

    def _spelled_out(self, case, q, k, v):
        from openvino import opset13 as op

        def constant(x):
            return op.convert(op.constant(x), q.get_element_type().get_type_name())

        L, D = case.shape[2:]
        scores = op.matmul(op.multiply(q, constant(np.float32(D**-0.5))), k, False, True)
        if case.causal:
            scores = op.add(scores, constant(np.triu(np.full((L, L), -np.inf, np.float32), 1)))
        return op.matmul(op.softmax(scores, -1), v, False, False)

    def _build(self, case, graph, array):
        import openvino

        element = getattr(openvino.Type, array)
        arrays = case.inputs()
        parameters = [openvino.opset13.parameter(x.shape, element) for x in arrays]
        model = openvino.Model([graph(case, *parameters)], parameters, "attention")
        compiled = openvino.Core().compile_model(model, "CPU", self._config)
        precision = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        if precision != self.precision:
            raise RuntimeError(f"openvino: expected inference precision {self.precision}, got {precision}")
        self._reported = compiled.get_property("INFERENCE_NUM_THREADS")
        request = compiled.create_infer_request()
        out = self._tensor(np.empty(case.shape, np.float32), element)
        tensors = [self._tensor(x, element) for x in arrays]
        for index, tensor in enumerate(tensors):
            request.set_input_tensor(index, tensor)
        request.set_output_tensor(0, out)
        layers = [node.get_rt_info()["layerType"].astype(str) for node in compiled.get_runtime_model().get_ops()]
        note = "compiled to " + ", ".join(x for x in layers if x not in ("Input", "Output", "Const"))
        return Candidate(request.infer, lambda _: self._read(out, element), note, (tensors, compiled))

    def _tensor(self, x, element):
        import openvino

        if element == openvino.Type.f32:
            return openvino.Tensor(x, shared_memory=True)
        tensor = openvino.Tensor(element, x.shape)
        bits = x.view(np.uint32)
        tensor.data.view(np.uint16)[...] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # to the nearest bfloat16
        return tensor

    def _read(self, tensor, element):
        import openvino

        if element == openvino.Type.f32:
            return tensor.data.copy()
        return (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class OpenVINOBf16(OpenVINO):
    """The same in bfloat16, from and to float32 arrays or bfloat16 ones."""

    name = "openvino bf16"
    precision = "bf16"
    formats = ("f32", "bf16")

    @classmethod
    def missing(cls):
        from cyflash import cpu_info

        if reason := super().missing():
            return reason
        return None if "avx512_bf16" in cpu_info()["features"] else "this CPU has no bfloat16 dot products"

    @classmethod
    def tolerance(cls, case):
        return BF16


SYSTEMS = {system.name: system for system in (Cyflash, NumPy, Torch, OnnxRuntime, OpenVINO)}
INT8_SYSTEMS = {system.name: system for system in (Cyflash, Torch, OpenVINOBf16)}  # of `--int8`
