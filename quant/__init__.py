"""Calibration and accuracy tools of cyflash, installed as `cyflash.quant`."""

from cyflash.quant.evaluation import evaluate
from cyflash.quant.metrics import Comparison, compare
from cyflash.quantized import LayerScales, QuantizedTensor, quantize

__all__ = ["Comparison", "LayerScales", "QuantizedTensor", "compare", "evaluate", "quantize"]
