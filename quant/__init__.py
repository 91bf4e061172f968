"""Accuracy tools, and int8 arrays with their scales, installed as `cyflash.quant`."""

from cyflash.quant.evaluation import evaluate
from cyflash.quant.metrics import Comparison, compare
from cyflash.quantized import LayerScales, QuantizedTensor, quantize

__all__ = ["Comparison", "LayerScales", "QuantizedTensor", "compare", "evaluate", "quantize"]
