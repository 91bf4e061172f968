"""Accuracy tools, and int8 arrays with their scales, installed as `cyflash.quant`."""

from cyflash.capture import load_capture, save_capture
from cyflash.quant import fixtures
from cyflash.quant.calibrator import Calibrator
from cyflash.quant.evaluation import evaluate
from cyflash.quant.metrics import Comparison, compare
from cyflash.quant.scales import Scales
from cyflash.quant.watching import watch
from cyflash.quantized import LayerScales, QuantizedTensor, quantize

__all__ = [
    "Calibrator", "Comparison", "LayerScales", "QuantizedTensor", "Scales", "compare", "evaluate", "fixtures",
    "load_capture", "quantize", "save_capture", "watch",
]  # fmt: skip
