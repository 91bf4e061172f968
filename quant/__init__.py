"""Calibration and accuracy tools of cyflash, installed as `cyflash.quant`."""
