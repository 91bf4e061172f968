"""Synthetic attention inputs that stress quantisation, each a function of a random generator and the sizes.

    name             what it is                                            stresses
    normal           N(0, 1)                                               nothing in particular
    uniform          U(0, 1)                                               nearly constant attention
    fa3_outlier      N(0, 1), and N(0, 100) added to 0.1 % of the entries  sparse outliers in Q, K and V
    k_channel_bias   K plus a constant of 8 to 20 in 6 of 64 channels      smoothing of K
    sink6, sink9     logits of the first four keys + 6 or 9, values x 0.05 small weights beside large ones, scale of V
    diffuse, peaky   Q x 0.3, Q x 3                                        many small weights, rows that are one-hot
    llm_like         bias, sink of 8 and log-normal norms of V             everything at once

fa3_outlier is the distribution of the FlashAttention-3 paper (Shah et al., 2024, section 4.3).
"""
import numpy as np

SINKS = 4
BIASED = 6 / 64


def normal(r, q_shape, kv_shape):
    return tuple(r.standard_normal(shape, dtype=np.float32) for shape in (q_shape, kv_shape, kv_shape))


def uniform(r, q_shape, kv_shape):
    return tuple(r.random(shape, dtype=np.float32) for shape in (q_shape, kv_shape, kv_shape))


def fa3_outlier(r, q_shape, kv_shape):
    def spiked(x):
        return x + np.where(r.random(x.shape) < 0.001, 10 * r.standard_normal(x.shape), 0).astype(np.float32)

    return tuple(map(spiked, normal(r, q_shape, kv_shape)))


def k_channel_bias(r, q_shape, kv_shape):
    q, k, v = normal(r, q_shape, kv_shape)
    return q, _with_biased_channels(r, k), v


def diffuse(r, q_shape, kv_shape):
    q, k, v = normal(r, q_shape, kv_shape)
    return np.float32(0.3) * q, k, v


def peaky(r, q_shape, kv_shape):
    q, k, v = normal(r, q_shape, kv_shape)
    return np.float32(3) * q, k, v


def sink6(r, q_shape, kv_shape):
    return _with_sinks(r, *normal(r, q_shape, kv_shape), 6)


def sink9(r, q_shape, kv_shape):
    return _with_sinks(r, *normal(r, q_shape, kv_shape), 9)


def llm_like(r, q_shape, kv_shape):
    q, k, v = normal(r, q_shape, kv_shape)
    v *= np.exp(0.5 * r.standard_normal((*kv_shape[:-1], 1), dtype=np.float32))
    q, k, v = _with_sinks(r, q, k, v, 8)
    return q, _with_biased_channels(r, k), v


def _with_biased_channels(r, k):
    """The same constant in every token, in a few channels of each head."""
    bias = r.uniform(8, 20, (*k.shape[:-2], 1, k.shape[-1])) * r.choice([-1, 1], (*k.shape[:-2], 1, k.shape[-1]))
    rank = r.random(bias.shape).argsort(axis=-1)
    return k + np.where(rank < max(1, round(BIASED * k.shape[-1])), bias, 0).astype(np.float32)


def _with_sinks(r, q, k, v, logit):
    """The first keys' scores are higher by `logit` in every row: one direction of the space is theirs alone."""
    D = q.shape[-1]
    direction = r.standard_normal(D)
    direction /= np.linalg.norm(direction)
    in_q = np.sqrt(D)
    in_k = logit * np.sqrt(D) / in_q
    q, k = (x - (x @ direction)[..., None] * direction for x in (q, k))
    q += in_q * direction
    k[..., :SINKS, :] += in_k * direction
    v = v.copy()
    v[..., :SINKS, :] *= 0.05
    return q.astype(np.float32), k.astype(np.float32), v


ALL = {f.__name__: f for f in (normal, uniform, fa3_outlier, k_channel_bias, sink6, sink9, diffuse, peaky, llm_like)}


def draw(name, seed=0, B=1, H=2, Lq=128, Lk=2048, D=64):
    """q, k, v of the distribution `name`, (B, H, L, D), float32."""
    r = np.random.default_rng([seed, B, H, Lq, Lk, D, *name.encode()])
    return ALL[name](r, (B, H, Lq, D), (B, H, Lk, D))
