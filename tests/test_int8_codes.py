"""The codes of P: equal to the simulation's but for ties, and with them the output is that of float32 arithmetic."""
import bounds_int8
import cases
import cases_int8
import numpy as np
import pytest

from cyflash.quant import fixtures

SHAPE = (1, 2, 1, 130, 500, 40, 24)  # B, H, Hk, Lq, Lk, D, Dv


@pytest.mark.parametrize("granularity", ["tensor", "head", "token", ("token", "tensor", "head")], ids=str)
@pytest.mark.parametrize("name", ["plain", "all"])
def test_few_codes_differ_each_by_one(build, granularity, name):
    q, k, v = cases.arrays(*SHAPE)
    options = cases.all_options(1, 2, 130, 500) if name == "all" else {}
    out, lse, codes, size = cases_int8.run(q, k, v, trace=True, granularity=granularity, **options)
    case = cases_int8.case(q, k, v, block_size=size, granularity=granularity, **options)
    report = case.check(out, lse, codes)
    assert report.flipped <= bounds_int8.FLIPPED
    expected = simulated(case)
    assert np.abs(codes - expected).max() <= 1
    assert (codes == 255).any(axis=-1).any() and len(np.unique(codes)) == 256


@pytest.mark.parametrize("name", fixtures.ALL)
def test_distributions(build, name):
    q, k, v = fixtures.draw(name, Lq=40, Lk=300)
    assert cases_int8.verify(q, k, v).flipped <= bounds_int8.FLIPPED


@pytest.mark.parametrize("blocks", [8, 32, 64, 512])
def test_each_block_has_a_scale_of_its_own(build, blocks):
    """The largest weight of every row in every block of keys is 255, however small beside that of others."""
    from cyflash import FlashAttentionConfig

    q, k, v = cases.arrays(1, 2, 2, 30, 512, 16)
    bias = np.zeros((30, 512), np.float32)
    bias[:, 64:128] = -80
    config = FlashAttentionConfig(head_dim=16, num_heads=2, block_size_q=48, block_size_kv=blocks)
    out, lse, codes, size = cases_int8.run(q, k, v, bias=bias, config=config, trace=True)
    cases_int8.case(q, k, v, bias=bias, block_size=size).check(out, lse, codes)
    for start in range(0, 512, size):
        assert (codes[..., start : start + size].max(axis=-1) == 255).all()


def test_nothing_where_nothing_is_seen(build):
    """Hidden keys, keys in float32, and rows that see no key of a block have codes 0."""
    q, k, v = cases.arrays(1, 1, 1, 100, 300, 16)
    mask = np.random.default_rng(0).random((100, 300)) < 0.5
    mask[7] = False
    mask[8, :200] = False
    out, lse, codes, size = cases_int8.run(q, k, v, mask=mask, fp32_sinks=5, trace=True)
    cases_int8.case(q, k, v, mask=mask, fp32_sinks=5, block_size=size).check(out, lse, codes)
    assert not codes[0, 0][~mask].any() and not codes[..., :5].any() and codes[0, 0, 8].any()


def simulated(case):
    from cyflash.reference_int8 import attend

    codes = [attend(part, case.call.fp32_sinks, case.call.pv, case.block_size)[2] for part in case.parts]
    return np.array(codes, np.int16).reshape(1, len(codes), *codes[0].shape)


# The comparer itself


@pytest.fixture
def result():
    q, k, v = cases.arrays(1, 2, 1, 60, 150, 16)
    out, lse, codes, size = cases_int8.run(q, k, v, trace=True)
    return cases_int8.case(q, k, v, block_size=size), out, lse, codes


def test_the_comparer_passes_what_is_right(result):
    case, out, lse, codes = result
    assert case.check(out, lse, codes).worst < 1
    assert case.check(out, lse).worst < 1


def test_the_comparer_sees_a_wrong_code(result):
    case, out, lse, codes = result
    for change in (2, -2, 100):
        wrong = codes.copy()
        wrong[0, 1, 30, 77] = (int(wrong[0, 1, 30, 77]) + change) % 256
        with pytest.raises(AssertionError, match="codes"):
            case.check(out, lse, wrong)


def test_the_comparer_sees_codes_that_are_not_those_of_the_output(result):
    """All codes within what roundings explain, but the output was made from others."""
    case, out, lse, codes = result
    with pytest.raises(AssertionError, match="out"):
        case.check(out * np.float32(1 + 2e-4), lse, codes)
    with pytest.raises(AssertionError, match="lse"):
        case.check(out, lse + np.float32(1e-4), codes)
    wrong = out.copy()
    wrong[0, 0, 3, 5] = np.nan
    with pytest.raises(AssertionError, match="NaN"):
        case.check(wrong, lse, codes)


def test_the_comparer_sees_other_block_sizes(result):
    """Blocks of another length have other codes: the simulation is that of this kernel, not of any."""
    case, out, lse, codes = result
    case.block_size = 40
    with pytest.raises(AssertionError):
        case.check(out, lse, codes)
