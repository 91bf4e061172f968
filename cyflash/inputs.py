"""What the commands share about input: captured activations, and options of the attention that override theirs."""

import argparse
import math

from cyflash.capture import LAYOUTS

__all__ = ["CONTENTS", "above_zero", "add_input_options", "given_options", "positive"]

CONTENTS = "q, k, v, or <layer>.q, <layer>.k, <layer>.v; each (L, D), (H, L, D) or (B, H, L, D)"


def add_input_options(parser, files="FILE"):
    """Add --layout, and a group of attention options."""
    parser.add_argument("--layout", choices=LAYOUTS, default="bhld", help=f"order of axes in {files} (default: bhld)")
    options = parser.add_argument_group("attention options", f"override what {files}'s metadata says")
    options.add_argument("--causal", action=argparse.BooleanOptionalAction, help="hide the keys after each query")
    options.add_argument("--scale", type=float, help="multiplies the scores (default: 1/sqrt(D))")
    options.add_argument(
        "--window", type=int, nargs=2, metavar=("L", "R"),
        help="keys visible to the left and right of each query; -1: all. W tokens, itself included: W-1 0",
    )  # fmt: skip
    options.add_argument("--softcap", type=float, help="scores become softcap * tanh(score / softcap); 0: off")


def given_options(args):
    """The attention options of the command line, as `flash_attention` takes them; those of a file come first."""
    given = {name: getattr(args, name) for name in ("causal", "scale", "window", "softcap")}
    return {name: tuple(x) if name == "window" else x for name, x in given.items() if x is not None}


def positive(text):
    """A whole number of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


def above_zero(text):
    """A finite number above 0, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return number
