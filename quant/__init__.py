"""Calibration and accuracy tools of cyflash, installed as `cyflash.quant`."""

from cyflash.quant.metrics import Comparison, compare

__all__ = ["Comparison", "compare"]
