"""What the calibrator's tests share: observations, settings by name, and two ways to say that results are the same."""
import numpy as np

from cyflash.quant import Calibrator

HISTOGRAM_METHODS = ("max", "percentile", "mse", "octav", "entropy")
METHODS = (*HISTOGRAM_METHODS, "output")
OPERANDS = ("q", "k", "v")
SCALES = ("q_scale", "k_scale", "v_scale")
SMALLEST_SCALE = np.finfo(np.float32).tiny


def normal(seed=0, H=2, Hk=None, Lq=24, Lk=None, D=8, Dv=None, B=None):
    """q, k, v of N(0, 1), float32, (H, L, D), or (B, H, L, D) with a B."""
    Hk, Lk, Dv = Hk or H, Lk or Lq, Dv or D
    r = np.random.default_rng([seed, H, Hk, Lq, Lk, D, Dv])
    batch = () if B is None else (B,)
    shapes = ((*batch, H, Lq, D), (*batch, Hk, Lk, D), (*batch, Hk, Lk, Dv))
    return tuple(r.standard_normal(shape, dtype=np.float32) for shape in shapes)


def long_tailed(seed=0, **sizes):
    """As `normal`, but every method finds another clip: Student's t with 3 degrees of freedom."""
    r = np.random.default_rng([seed, 7])
    return tuple(r.standard_t(3, x.shape).astype(np.float32) for x in normal(seed, **sizes))


def calibrated(*observations, name="layer", options=None, **settings):
    """A Calibrator that has seen these (q, k, v), in this order."""
    calibrator = Calibrator(**settings)
    for qkv in observations:
        calibrator.observe(name, *qkv, **(options or {}))
    return calibrator


def joined(parts):
    """The calibrators merged into the first one."""
    first, *others = parts
    for other in others:
        assert first.merge(other) is first
    return first


def copy_of(calibrator, folder):
    return Calibrator.load(calibrator.save(folder / "copy.safetensors"))


def state(calibrator, folder):
    """All that a calibrator knows, as bytes."""
    return calibrator.save(folder / "state.safetensors").read_bytes()


def bits(scales):
    """{layer: all its numbers}, which are equal only where every bit is."""
    return {name: _bits(layer) for name, layer in scales.items()}


def _bits(layer):
    if layer is None:
        return None
    if layer.parts is not None:
        return tuple((tuple(heads), _bits(part)) for heads, part in layer.parts)
    arrays = (getattr(layer, name) for name in (*SCALES, "k_mean"))
    return (*(x if x is None else (x.shape, x.dtype.str, x.tobytes()) for x in arrays), layer.fp32_sinks, layer.pv)


def clips(layer):
    """{"q", "k", "v"}: the greatest value that does not saturate, in float64."""
    return {part: 127 * np.float64(getattr(layer, f"{part}_scale")) for part in OPERANDS}


def clip_of(values, method, part="v", **arguments):
    """The clip that `method` chooses for these values of v, any number and any shape."""
    v = np.asarray(values, np.float32).reshape(1, -1, 1)
    q, k = np.ones((1, 1, 1), np.float32), np.ones_like(v)
    scales = calibrated((q, k, v), smooth_k=False).compute(method, **arguments)
    return clips(scales["layer"])[part].item()


def bin_ratio(histogram):
    """How much wider than its lower edge a bin is at most, beside 1, where values are neither tiny nor huge."""
    edges = histogram.edges
    inner = edges[(edges > 1e-3) & (edges < 1e3)]
    ratio = (inner[1:] / inner[:-1]).max()
    assert 1 < ratio <= 1.07, "bins that say little"
    return ratio
