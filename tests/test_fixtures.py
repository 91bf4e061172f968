"""The synthetic inputs: seeded, the same from release to release, and each with the property that it is there for."""
import doctest

import numpy as np
import pytest

from cyflash import quant
from cyflash.quant import fixtures
from cyflash.quant.fixtures import ALL, draw
from cyflash.reference import attention

SMALL = {"seed": 5, "H": 1, "Lq": 8, "Lk": 8, "D": 16}
# q's first, k's last and v's number at (0, -1), and the sums of |q|, |k|, |v|, of the small draw. Compared to within
# rounding: a product of another BLAS or an exp of another libm may differ in its last bits.
DRAWN = {
    "normal": (-0.80941, 0.06298, 0.46585, 107.16825, 105.38274, 114.56241),
    "uniform": (0.89779, 0.58817, 0.42178, 64.59538, 60.00629, 66.29126),
    "student_t": (-0.44716, 0.85659, -0.79368, 84.24548, 88.82956, 97.81041),
    "laplace": (-2.1442, -0.24069, -0.56429, 94.99573, 97.24779, 84.45009),
    "fa3_outlier": (-0.75072, -0.92481, 0.173, 134.40985, 86.42628, 98.85703),
    "k_channel_bias": (0.2849, 1.67997, 1.59482, 101.95702, 400.44202, 105.01317),
    "sink6": (3.09644, -0.3809, 0.00366, 145.15732, 146.71135, 57.72607),
    "sink9": (-1.73797, -2.95058, 0.09074, 143.47461, 181.9837, 48.42834),
    "diffuse": (-0.24735, 1.40566, 1.53955, 27.78756, 90.79068, 109.04333),
    "peaky": (-0.20502, -0.08458, 2.86384, 291.43213, 90.26303, 102.24181),
    "llm_like": (-0.85387, 13.98594, 0.02601, 155.86345, 303.17105, 42.91239),
}
OF_MODEL_2 = {
    "k_channel_bias": (0.2849, 1.67997, 1.59482, 101.95702, 346.39435, 105.01317),
    "sink6": (0.06751, -0.75005, 0.00366, 144.03818, 151.26224, 57.72607),
    "sink9": (0.74343, -1.52302, 0.09074, 140.04419, 175.88629, 48.42834),
    "llm_like": (-0.45059, -18.87645, 0.02601, 136.73639, 365.03519, 42.91239),
}
BIASED = ("k_channel_bias", "llm_like")
WITH_SINKS = ("sink6", "sink9", "llm_like")
WEIGHTLESS = [name for name in ALL if name not in OF_MODEL_2]


@pytest.fixture(params=ALL)
def name(request):
    return request.param


def summary(q, k, v):
    return [q[0, 0, 0, 0], k[0, 0, -1, -1], v[0, 0, 0, -1], *(np.abs(x, dtype=np.float64).sum() for x in (q, k, v))]


def equal(a, b):
    return [np.array_equal(x, y) for x, y in zip(a, b, strict=True)]


def test_draws_stay_what_they_are(name):
    np.testing.assert_allclose(summary(*draw(name, **SMALL)), DRAWN[name], rtol=2e-6, atol=1e-5)
    with_model = OF_MODEL_2.get(name, DRAWN[name])
    np.testing.assert_allclose(summary(*draw(name, model=2, **SMALL)), with_model, rtol=2e-6, atol=1e-5)
    assert DRAWN.keys() == ALL.keys()


@pytest.mark.parametrize("model", [None, 0, 3])
def test_shapes_and_dtype(name, model):
    q, k, v = draw(name, 1, B=2, H=3, Lq=5, Lk=7, D=10, model=model)
    assert (q.shape, k.shape, v.shape) == ((2, 3, 5, 10), (2, 3, 7, 10), (2, 3, 7, 10))
    for x in (q, k, v):
        assert x.dtype == np.float32 and x.flags.c_contiguous and np.isfinite(x).all()
    assert not np.shares_memory(k, v)


@pytest.mark.parametrize("model", [None, 3])
def test_the_same_arguments_give_the_same_bits_and_others_do_not(name, model):
    first = draw(name, model=model, **SMALL)
    assert all(equal(first, draw(name, model=model, **SMALL)))
    assert not any(equal(first, draw(name, model=model, **SMALL | {"seed": 6})))
    assert len({x.tobytes() for x in first}) == 3  # q, k and v are different draws


def channel_bias(k):
    """Each channel's constant, rounded away from noise of the tokens; (B, H, D)."""
    mean = k.mean(-2)
    return np.where(np.abs(mean) > 4, mean, 0)


def sink_direction(q):
    mean = q.astype(np.float64).mean((0, 1, 2))
    return mean / np.linalg.norm(mean)


@pytest.mark.parametrize("name", BIASED)
def test_biased_channels_are_those_of_the_model(name):
    drawn = {
        (model, seed): channel_bias(draw(name, seed, B=2, H=3, Lq=4, Lk=1000, model=model)[1])
        for model in (0, 1) for seed in (0, 1)
    }
    assert ((drawn[0, 0] != 0).sum(-1) == 6).all()
    np.testing.assert_allclose(drawn[0, 0], drawn[0, 1], atol=0.5)  # of other tokens
    np.testing.assert_allclose(drawn[0, 0][0], drawn[0, 0][1], atol=0.5)  # of another sequence
    assert not np.allclose(drawn[0, 0], drawn[1, 0], atol=0.5)  # of another model
    assert not np.allclose(drawn[0, 0][:, 0], drawn[0, 0][:, 1], atol=0.5)  # of another head
    longer = channel_bias(draw(name, 0, B=1, H=3, Lq=9, Lk=1500, model=0)[1])
    np.testing.assert_allclose(longer[0], drawn[0, 0][0], atol=0.5)  # whatever B and the lengths
    own = [channel_bias(draw(name, seed, B=2, H=3, Lq=4, Lk=1000)[1]) for seed in (0, 1)]
    assert not np.allclose(own[0], own[1], atol=0.5) and not np.allclose(own[0][0], own[0][1], atol=0.5)


@pytest.mark.parametrize("name", WITH_SINKS)
def test_the_direction_of_the_sinks_is_that_of_the_model(name):
    first, again, other = (sink_direction(draw(name, seed, Lq=2000, Lk=8, model=model)[0])
                           for seed, model in ((0, 0), (1, 0), (0, 1)))
    assert first @ again > 0.99
    assert abs(first @ other) < 0.6
    assert abs(sink_direction(draw(name, 0, Lq=2000, Lk=8)[0]) @ sink_direction(draw(name, 1, Lq=2000, Lk=8)[0])) < 0.6


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_without_weights_a_model_changes_nothing(name):
    assert all(equal(draw(name, **SMALL), draw(name, model=7, **SMALL)))


def test_a_model_changes_the_weights_and_not_the_tokens():
    q, k, v = draw("k_channel_bias", **SMALL)
    other_q, other_k, other_v = draw("k_channel_bias", model=0, **SMALL)
    assert equal((q, k, v), (other_q, other_k, other_v)) == [True, False, True]


# The property that each claims to have


def moments(x):
    x = x.astype(np.float64).ravel()
    centred = x - x.mean()
    return x.mean(), x.std(), (centred**4).mean() / x.var() ** 2


@pytest.mark.parametrize(
    ("name", "mean", "deviation", "kurtosis"),
    [("normal", 0, 1, (2.9, 3.1)), ("uniform", 0.5, 1 / np.sqrt(12), (1.75, 1.85)), ("laplace", 0, 1, (5.5, 6.5)),
     ("student_t", 0, 1, (7, np.inf)), ("fa3_outlier", 0, np.sqrt(1.1), (10, np.inf))],
)  # fmt: skip
def test_moments(name, mean, deviation, kurtosis):
    for x in draw(name, H=8, Lq=2000):
        got = moments(x)
        np.testing.assert_allclose(got[:2], (mean, deviation), atol=0.02)
        assert kurtosis[0] < got[2] < kurtosis[1]


def test_tails_are_those_of_the_distributions():
    from scipy import stats

    for name, law in (("student_t", stats.t(4, scale=np.sqrt(0.5))), ("laplace", stats.laplace(scale=np.sqrt(0.5)))):
        x = np.concatenate([x.ravel() for x in draw(name, H=4)])
        for threshold in (0.5, 2, 4):
            expected = 2 * law.sf(threshold)
            assert np.mean(np.abs(x) > threshold) == pytest.approx(expected, rel=0.1)


def test_outliers_are_one_in_a_thousand():
    for x in draw("fa3_outlier", H=8, Lq=2000):
        far = 2 * 0.3085  # P(|N(0, 101)| > 5), sigma 10.05
        assert np.mean(np.abs(x) > 5) == pytest.approx(0.001 * far, rel=0.15)


@pytest.mark.parametrize(("name", "factor"), [("diffuse", 0.3), ("peaky", 3)])
def test_queries_that_are_scaled(name, factor):
    q, k, _ = draw(name)
    assert q.std() == pytest.approx(factor, rel=0.02) and k.std() == pytest.approx(1, rel=0.02)
    top = np.sort(weights(q, k))[..., -64:].sum(-1)  # of 2048
    assert (np.median(top) > 0.6) if name == "peaky" else (np.median(top) < 0.06)


def weights(q, k):
    """Softmax of the scores, (B, H, Lq, Lk): attention with one-hot values."""
    return attention(q, k, np.broadcast_to(np.eye(k.shape[-2]), (*k.shape[:-1], k.shape[-2])))


@pytest.mark.parametrize(("name", "logit"), [("sink6", 6), ("sink9", 9), ("llm_like", 8)])
def test_first_keys_draw_every_row(name, logit):
    q, k, v = (x.astype(np.float64) for x in draw(name))
    scores = q @ (k - k.mean(-2, keepdims=True)).swapaxes(-1, -2) / 8  # a constant of the row moves no weight
    lift = scores[..., :4].mean() - scores[..., 4:].mean()
    assert lift == pytest.approx(logit, abs=0.5)
    others = np.linalg.norm(v[..., 4:, :], axis=-1).mean()
    assert np.linalg.norm(v[..., :4, :], axis=-1).mean() == pytest.approx(0.05 * others, rel=0.5)


def test_norms_of_the_values_are_log_normal():
    norms = np.log(np.linalg.norm(draw("llm_like", Lk=4000)[2][..., 4:, :], axis=-1))
    assert norms.std() == pytest.approx(np.sqrt(0.25 + 1 / 128), rel=0.05)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"name: expected one of normal, uniform, .*, got 'gauss'"):
        draw("gauss")
    for wrong in ({"seed": -1}, {"model": -1}, {"Lk": -1}):
        with pytest.raises(ValueError):
            draw("llm_like", **wrong)


def test_the_module_is_public_and_its_example_runs():
    assert quant.fixtures is fixtures and "fixtures" in quant.__all__
    assert doctest.testmod(fixtures).failed == 0
