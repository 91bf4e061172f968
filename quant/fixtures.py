"""Synthetic queries, keys and values that stress quantisation: for tests, and to try a scheme of one's own on.

    name             what it is                                            stresses
    normal           N(0, 1)                                               nothing in particular
    uniform          U(0, 1)                                               nearly constant attention
    student_t        Student's t with 4 degrees of freedom, variance 1     heavy tails: the scale of a whole tensor
    laplace          Laplace, variance 1                                   tails between the two
    fa3_outlier      N(0, 1), and N(0, 100) added to 0.1 % of the entries  sparse outliers in Q, K and V
    k_channel_bias   K plus a constant of 8 to 20 in 6 of 64 channels      smoothing of K
    sink6, sink9     logits of the first four keys + 6 or 9, values x 0.05 small weights beside large ones, scale of V
    diffuse, peaky   Q x 0.3, Q x 3                                        many small weights, a few large ones
    llm_like         bias, sink of 8 and log-normal norms of V             everything at once

Where a real model has weights, the biased channels of the keys and the direction of the sinks, all draws of one `model`
share them and differ in their tokens: what calibration needs to be tried on one draw and judged on another.
"""
import numpy as np

__all__ = [
    "ALL", "diffuse", "draw", "fa3_outlier", "k_channel_bias", "laplace", "llm_like", "normal", "peaky", "sink6",
    "sink9", "student_t", "uniform",
]

SINKS = 4
BIASED = 6 / 64
FREEDOM = 4


def draw(name, seed=0, B=1, H=2, Lq=128, Lk=2048, D=64, model=None):
    """Queries, keys and values of one distribution, the same for the same arguments.

    Parameters
    ----------
    name : str
        One of `ALL`.
    seed : int, default 0
        Of the tokens; at least 0.
    B, H, Lq, Lk, D : int
        Sequences, heads, queries, keys, and channels of a head.
    model : int, optional
        Of the weights, at least 0: draws of one model, name, H and D have the same biased channels and the same
        direction of the sinks in every sequence, whatever `seed`, B and the lengths. Default: they come from `seed` as
        well, the biased channels anew in each sequence. Distributions without weights do not depend on it.

    Returns
    -------
    q : ndarray of float32, shape (B, H, Lq, D)
    k, v : ndarray of float32, shape (B, H, Lk, D)

    Raises
    ------
    ValueError
        For an unknown name, and for sizes below 0.

    Notes
    -----
    fa3_outlier is the distribution of the FlashAttention-3 paper (Shah et al. 2024, arXiv:2407.08608, section 4.3).
    Channels of the keys that are far from 0 in every token are what SageAttention smooths (Zhang et al. 2024,
    arXiv:2410.02367); first tokens that draw most of the weight while their values are small are the attention sinks of
    Xiao et al. (2023, arXiv:2309.17453). Their sizes here are chosen, not measured on a model.

    Examples
    --------
    >>> from cyflash.quant import fixtures
    >>> q, k, v = fixtures.draw("llm_like", seed=1, model=0)
    >>> q.shape, k.shape, k.dtype
    ((1, 2, 128, 64), (1, 2, 2048, 64), dtype('float32'))
    >>> other = fixtures.draw("llm_like", seed=2, model=0)[1]
    >>> bool(((abs(k.mean(-2)) > 4) == (abs(other.mean(-2)) > 4)).all())  # other tokens, the same biased channels
    True
    """
    if name not in ALL:
        raise ValueError(f"name: expected one of {', '.join(ALL)}, got {name!r}")
    letters = name.encode()
    tokens = np.random.default_rng([seed, B, H, Lq, Lk, D, *letters])
    weights = None if model is None else np.random.default_rng([model, H, D, *letters])
    return ALL[name](tokens, (B, H, Lq, D), (B, H, Lk, D), weights)


# Each: (generator of the tokens, shape of q, shape of k and v, generator of the weights or None) -> q, k, v


def normal(r, q_shape, kv_shape, weights=None):
    """N(0, 1)."""
    return _each(lambda shape: r.standard_normal(shape, dtype=np.float32), q_shape, kv_shape)


def uniform(r, q_shape, kv_shape, weights=None):
    """U(0, 1): the mean of every channel is far from 0, and rows attend nearly evenly."""
    return _each(lambda shape: r.random(shape, dtype=np.float32), q_shape, kv_shape)


def student_t(r, q_shape, kv_shape, weights=None):
    """Student's t with 4 degrees of freedom, divided by its standard deviation: the fourth moment is infinite."""
    deviation = np.sqrt(FREEDOM / (FREEDOM - 2))
    return _each(lambda shape: (r.standard_t(FREEDOM, shape) / deviation).astype(np.float32), q_shape, kv_shape)


def laplace(r, q_shape, kv_shape, weights=None):
    """Laplace of variance 1."""
    return _each(lambda shape: r.laplace(0, np.sqrt(0.5), shape).astype(np.float32), q_shape, kv_shape)


def fa3_outlier(r, q_shape, kv_shape, weights=None):
    """N(0, 1), with N(0, 100) added to one entry in a thousand."""

    def spiked(x):
        return x + np.where(r.random(x.shape) < 0.001, 10 * r.standard_normal(x.shape), 0).astype(np.float32)

    return tuple(map(spiked, normal(r, q_shape, kv_shape)))


def k_channel_bias(r, q_shape, kv_shape, weights=None):
    """N(0, 1); in 6 of 64 channels of each head's keys +-8 to 20 is added, the same in every token."""
    q, k, v = normal(r, q_shape, kv_shape)
    return q, _with_biased_channels(r, k, weights), v


def diffuse(r, q_shape, kv_shape, weights=None):
    """N(0, 1), queries x 0.3: many weights of nearly one size."""
    q, k, v = normal(r, q_shape, kv_shape)
    return np.float32(0.3) * q, k, v


def peaky(r, q_shape, kv_shape, weights=None):
    """N(0, 1), queries x 3: a few keys of thousands have most of a row's weight."""
    q, k, v = normal(r, q_shape, kv_shape)
    return np.float32(3) * q, k, v


def sink6(r, q_shape, kv_shape, weights=None):
    """N(0, 1); the logits of the first four keys are higher by 6 in every row, and their values 20 times smaller."""
    return _with_sinks(r, *normal(r, q_shape, kv_shape), 6, weights)


def sink9(r, q_shape, kv_shape, weights=None):
    """As sink6, higher by 9."""
    return _with_sinks(r, *normal(r, q_shape, kv_shape), 9, weights)


def llm_like(r, q_shape, kv_shape, weights=None):
    """Biased channels, sinks higher by 8, and values whose norms are log-normal with sigma 0.5."""
    q, k, v = normal(r, q_shape, kv_shape)
    v *= np.exp(0.5 * r.standard_normal((*kv_shape[:-1], 1), dtype=np.float32))
    q, k, v = _with_sinks(r, q, k, v, 8, weights)
    return q, _with_biased_channels(r, k, weights), v


def _each(one, q_shape, kv_shape):
    return tuple(one(shape) for shape in (q_shape, kv_shape, kv_shape))


def _with_biased_channels(r, k, weights):
    """The same constant in every token, in a few channels of each head; of a model: in every sequence as well."""
    heads = k.shape[:-2] if weights is None else (1, k.shape[-3])
    r = r if weights is None else weights
    bias = r.uniform(8, 20, (*heads, 1, k.shape[-1])) * r.choice([-1, 1], (*heads, 1, k.shape[-1]))
    rank = r.random(bias.shape).argsort(axis=-1)
    return k + np.where(rank < max(1, round(BIASED * k.shape[-1])), bias, 0).astype(np.float32)


def _with_sinks(r, q, k, v, logit, weights):
    """The first keys' scores are higher by `logit` in every row: one direction of the space is theirs alone."""
    D = q.shape[-1]
    direction = (r if weights is None else weights).standard_normal(D)
    direction /= np.linalg.norm(direction)
    in_q = np.sqrt(D)
    in_k = logit * np.sqrt(D) / in_q
    q, k = (x - (x @ direction)[..., None] * direction for x in (q, k))
    q += in_q * direction
    k[..., :SINKS, :] += in_k * direction
    v = v.copy()
    v[..., :SINKS, :] *= 0.05
    return q.astype(np.float32), k.astype(np.float32), v


ALL = {
    f.__name__: f
    for f in (
        normal, uniform, student_t, laplace, fa3_outlier, k_channel_bias, sink6, sink9, diffuse, peaky, llm_like,
    )
}
