"""Options of attention for arrays of given sizes, and how a call is made: threads, tile sizes."""
import dataclasses

import numpy as np

from cyflash import FlashAttentionConfig


def options(draw, B, H, Lq, Lk, lead=None, align=True):
    """Each with some probability. lead: q's shape without its last two axes, (B, H) or fewer axes."""
    r, found, longest = draw.numbers, {}, max(Lq, Lk, 1)
    lead = (B, H) if lead is None else lead
    if draw.chance(0.4):
        found["causal"] = draw.chance(0.8)
    if align and draw.chance(0.3):
        found["causal_align"] = draw.choice(("top-left", "bottom-right"))
    if draw.chance(0.25):
        found["scale"] = draw.choice((0.0, 0.1, 1.0, draw.uniform(-0.5, 0.5)))
    if draw.chance(0.25):
        found["window"] = tuple(draw.choice((-1, 0, draw.randint(0, longest))) for _ in range(2))
    if draw.chance(0.2):
        found["softcap"] = draw.choice((0.0, 0.5, 3.0, 50.0))
    if draw.chance(0.25):
        found["bias"] = bias(draw, part_of(draw, (*lead, Lq, Lk)))
    if draw.chance(0.25):
        found["mask"] = np.asarray(r.random(part_of(draw, (*lead, Lq, Lk))) < draw.choice((0.3, 0.7, 0.95)))
    if draw.chance(0.2):
        shape = (B, H) if draw.chance(0.5) else (H,)
        found["alibi_slopes"] = r.random(shape, np.float32) * np.float32(draw.choice((0.05, 1.0)))
    if draw.chance(0.2):
        found["sinks"] = r.standard_normal(H, np.float32) + np.float32(draw.choice((0.0, 3.0)))
    return found


def bias(draw, shape):
    x = np.asarray(draw.numbers.standard_normal(shape, np.float32) * np.float32(draw.choice((1.0, 8.0))))
    if draw.chance(0.3):
        x = np.where(draw.numbers.random(shape) < 0.4, np.float32(-np.inf), x)
    return x


def part_of(draw, shape):
    """A shape that broadcasts to this one."""
    if draw.chance(0.5):
        return shape
    return tuple(n if draw.chance(0.6) else 1 for n in shape)[draw.randint(0, len(shape)) :]


def config(draw, D, H):
    """None, or a config, whose tiles are still to be drawn."""
    if draw.chance(0.7):
        return None
    return FlashAttentionConfig(head_dim=D, num_heads=H, causal=draw.chance(0.3), scale=draw.choice((None, 0.2)))


def tiles(draw, config):
    """The config with tile sizes."""
    if config is None:
        return None
    return dataclasses.replace(
        config, block_size_q=draw.choice((1, 16, 32, 64, 200)),
        block_size_kv=draw.choice((1, 8, 16, 32, 64, 128, 300)),
    )


def threads(draw):
    """None is one: see `run.small_work`."""
    return draw.choice((*9 * (None,), 2, 2, 3))


def with_config(options, config):
    """The options that count: config's where none are given."""
    if config is None:
        return options
    return {"causal": config.causal, **({} if config.scale is None else {"scale": config.scale}), **options}
