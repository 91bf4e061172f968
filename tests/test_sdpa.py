"""scaled_dot_product_attention against torch's: shapes, broadcasting, masks, what torch refuses; bad input."""
import bounds
import numpy as np
import pytest

import cyflash
from cyflash import flash_attention, scaled_dot_product_attention

F32 = np.float32
TOLERANCES = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 2e-2}  # of numbers near 1, in both libraries


def random(*shape, dtype="float32", seed=0):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return np.random.default_rng([seed, *shape]).standard_normal(shape, F32).astype(dtype)


def inputs(query, key, value, dtype="float32"):
    return [random(*shape, dtype=dtype, seed=n) for n, shape in enumerate((query, key, value))]


def verify(arrays, dtype="float32", **options):
    """Compare with torch on the same arrays."""
    torch = pytest.importorskip("torch")

    def tensor(x):
        return torch.from_numpy(x.astype(F32)).to(getattr(torch, x.dtype.name))

    masks = {name: tensor(x) for name, x in options.items() if isinstance(x, np.ndarray)}
    expected = torch.nn.functional.scaled_dot_product_attention(*map(tensor, arrays), **options | masks)
    expected = expected.to(torch.float32).numpy()
    out = scaled_dot_product_attention(*arrays, **options)
    assert out.dtype == arrays[0].dtype and out.shape == expected.shape and out.flags.c_contiguous
    np.testing.assert_allclose(out.astype(F32), expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    return out


SHAPES = {
    "2 axes": ((7, 16), (9, 16), (9, 16)),
    "3 axes": ((3, 7, 16), (3, 9, 16), (3, 9, 16)),
    "4 axes": ((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 16)),
    "5 axes": ((2, 2, 3, 7, 16), (2, 2, 3, 9, 16), (2, 2, 3, 9, 16)),
    "6 axes": ((2, 1, 2, 3, 7, 16), (2, 1, 2, 3, 9, 16), (2, 1, 2, 3, 9, 16)),
    "Dv": ((2, 3, 7, 16), (2, 3, 9, 16), (2, 3, 9, 12)),
    "Dv, 2 axes": ((7, 16), (9, 16), (9, 12)),
    "fewer keys": ((2, 3, 9, 16), (2, 3, 7, 16), (2, 3, 7, 16)),
    "one query": ((2, 3, 1, 16), (2, 3, 300, 16), (2, 3, 300, 16)),
    "long": ((1, 2, 300, 64), (1, 2, 300, 64), (1, 2, 300, 64)),
    "one head of keys": ((2, 4, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)),
    "one head of keys alone": ((2, 4, 7, 16), (2, 1, 9, 16), (2, 4, 9, 16)),
    "one head of values alone": ((2, 4, 7, 16), (2, 4, 9, 16), (2, 1, 9, 16)),
    "one head of queries": ((2, 1, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
    "one batch of keys": ((2, 4, 7, 16), (1, 4, 9, 16), (1, 4, 9, 16)),
    "one batch of values": ((2, 4, 7, 16), (2, 4, 9, 16), (1, 4, 9, 16)),
    "one batch of queries": ((1, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
    "keys of fewer axes": ((2, 4, 7, 16), (9, 16), (9, 16)),
    "keys without a batch": ((2, 4, 7, 16), (4, 9, 16), (4, 9, 16)),
    "queries of fewer axes": ((7, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
    "values of fewer axes": ((2, 4, 7, 16), (2, 4, 9, 16), (4, 9, 16)),
    "every other axis": ((2, 1, 2, 1, 7, 16), (1, 3, 1, 4, 9, 16), (1, 3, 1, 4, 9, 16)),
    "5 axes over 4": ((3, 2, 4, 7, 16), (2, 4, 9, 16), (2, 1, 9, 16)),
    "inner batch": ((2, 3, 4, 7, 16), (2, 1, 4, 9, 16), (2, 1, 4, 9, 16)),
    "no batch": ((0, 4, 7, 16), (0, 4, 9, 16), (0, 4, 9, 16)),
    "no heads": ((2, 0, 7, 16), (2, 0, 9, 16), (2, 0, 9, 16)),
    "no queries": ((2, 4, 0, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
    "no keys": ((2, 4, 7, 16), (2, 4, 0, 16), (2, 4, 0, 16)),
}
GQA = {
    "4 over 2": ((2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16)),
    "4 over 1": ((2, 4, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)),
    "4 over 4": ((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
    "3 axes": ((6, 7, 16), (3, 9, 16), (3, 9, 12)),
    "5 axes": ((2, 2, 4, 7, 16), (2, 2, 2, 9, 16), (2, 2, 2, 9, 16)),
    "one batch of keys": ((2, 4, 7, 16), (1, 2, 9, 16), (1, 2, 9, 16)),
    "inner batch": ((2, 3, 4, 7, 16), (2, 1, 2, 9, 16), (2, 1, 2, 9, 16)),
    "keys of fewer axes": ((2, 4, 7, 16), (2, 9, 16), (2, 9, 16)),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes(shapes, is_causal, dtype):
    verify(inputs(*shapes, dtype), dtype, is_causal=is_causal)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", GQA.values(), ids=GQA)
def test_gqa(shapes, is_causal, dtype):
    verify(inputs(*shapes, dtype), dtype, is_causal=is_causal, enable_gqa=True)


MASKS = [(9,), (1, 9), (7, 1), (7, 9), (1, 1, 9), (4, 7, 9), (1, 7, 9), (2, 1, 1, 9), (1, 4, 7, 1), (2, 4, 7, 9)]


def masks(shape, kind):
    chosen = np.random.default_rng([*shape, 5]).random(shape) < 0.6
    if kind == "bool":
        return chosen
    return np.where(chosen, random(*shape), F32(-np.inf) if kind == "-inf" else F32(1))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", ["bool", "float", "-inf"])
@pytest.mark.parametrize("shape", [shape for shape in MASKS if len(shape) > 1], ids=str)
def test_masks(shape, kind, dtype):
    verify(inputs((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16), dtype), dtype, attn_mask=masks(shape, kind))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["float", "-inf"])
def test_masks_of_16_bit(kind, dtype):
    """Of query's dtype; beside others float32 alone."""
    arrays = inputs((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16), dtype)
    mask = masks((4, 7, 9), kind).astype(arrays[0].dtype)
    out = verify(arrays, dtype, attn_mask=mask)
    assert np.array_equal(out, scaled_dot_product_attention(*arrays, attn_mask=mask.astype(F32)))
    with pytest.raises(TypeError, match=f"attn_mask: expected bool .* query's float32 .* got {dtype}"):
        scaled_dot_product_attention(*(x.astype(F32) for x in arrays), attn_mask=mask)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("lead, shape", [
    ((), (7, 9)), ((4,), (4, 7, 9)), ((4,), (7, 9)), ((2, 3, 4), (7, 9)), ((2, 3, 4), (2, 3, 4, 7, 9)),
    ((2, 3, 4), (2, 1, 1, 7, 9)), ((2, 3, 4), (3, 4, 1, 9)), ((2, 3, 4), (1, 3, 1, 7, 9)), ((2, 3, 4), (2, 1, 4, 7, 1)),
], ids=str)
def test_masks_of_other_ranks(lead, shape, kind):
    verify(inputs((*lead, 7, 16), (*lead, 9, 16), (*lead, 9, 16)), attn_mask=masks(shape, kind))


def test_mask_of_keys_alone():
    """One axis, as torch's documentation has it ("broadcastable"), though its CPU implementation wants two."""
    arrays = inputs((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16))
    mask = masks((9,), "bool")
    out = scaled_dot_product_attention(*arrays, attn_mask=mask)
    assert np.array_equal(out, scaled_dot_product_attention(*arrays, attn_mask=mask[None]))
    assert not np.array_equal(out, scaled_dot_product_attention(*arrays))


@pytest.mark.parametrize("kind", ["bool", "-inf"])
@pytest.mark.parametrize("shapes", [SHAPES[name] for name in ("2 axes", "4 axes", "5 axes", "Dv")], ids=str)
def test_rows_that_see_nothing(shapes, kind):
    """0 in both libraries."""
    mask = np.ones((7, 9), bool)
    mask[2] = mask[5] = False
    out = verify(inputs(*shapes), attn_mask=mask if kind == "bool" else np.where(mask, F32(0), F32(-np.inf)))
    assert (out[..., [2, 5], :] == 0).all() and (out[..., [0, 1, 3, 4, 6], :] != 0).all()


@pytest.mark.parametrize("scale", [0.3, -0.2, 0.0, 1, np.float32(0.5)])
def test_scale(scale):
    verify(inputs((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16)), scale=float(scale))
    arrays = inputs((2, 4, 7, 16), (2, 4, 9, 16), (2, 4, 9, 16))
    out = scaled_dot_product_attention(*arrays, scale=scale)
    assert np.array_equal(out, flash_attention(*arrays, scale=scale))
    assert not np.array_equal(out, scaled_dot_product_attention(*arrays))


def test_positional_arguments():
    """In torch's order."""
    arrays = inputs((2, 4, 7, 16), (2, 2, 9, 16), (2, 2, 9, 16))
    mask = masks((7, 9), "float")
    out = scaled_dot_product_attention(*arrays, mask, 0.0, False, 0.3, True)
    assert np.array_equal(out, flash_attention(*arrays, bias=mask, scale=0.3))
    out = scaled_dot_product_attention(*arrays, None, 0.0, True, None, True)
    assert np.array_equal(out, flash_attention(*arrays, causal=True, causal_align="top-left"))


def test_causal_is_top_left():
    arrays = inputs((2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 16))
    out = verify(arrays, is_causal=True)
    assert np.allclose(out[..., 0, :], arrays[2][..., 0, :], atol=1e-6)
    assert not np.allclose(out, flash_attention(*arrays, causal=True))


def test_within_the_bound():
    """It is flash_attention on the broadcast arrays."""
    query, key, value = inputs((3, 40, 16), (2, 1, 50, 16), (2, 1, 50, 16))
    mask = masks((2, 1, 40, 50), "-inf")
    wide = [np.broadcast_to(x, (2, 3, *x.shape[-2:])) for x in (query, key, value)]
    case = bounds.Case(*wide, bias=np.broadcast_to(mask, (2, 3, 40, 50)))
    case.check(scaled_dot_product_attention(query, key, value, attn_mask=mask))


STRIDED = {  # views of four axes of which some cannot be joined
    "heads last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, -3, -1)), -1, -3),
    "batch last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -2)), -2, 0),
    "axes swapped": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
    "every other": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "fortran": np.asfortranarray,
}


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("layout", STRIDED.values(), ids=STRIDED)
def test_strides(layout, which):
    """Same bits for any strides of query, key, value or mask, whether leading axes can be joined or not."""
    arrays = inputs((2, 3, 4, 7, 16), (2, 3, 2, 9, 16), (2, 3, 2, 9, 16))
    arrays.append(masks((2, 3, 4, 7, 9), "float"))
    expected = scaled_dot_product_attention(*arrays, enable_gqa=True)
    strided = layout(arrays[which])
    assert np.array_equal(strided, arrays[which]) and not strided.flags.c_contiguous
    arrays[which] = strided
    assert np.array_equal(scaled_dot_product_attention(*arrays, enable_gqa=True), expected)


def test_nothing_is_copied(monkeypatch):
    """What reaches the kernel are views: broadcast axes, more than four axes, axes that cannot be joined."""
    from cyflash import sdpa
    from cyflash.attention import attend

    seen = []

    def spy(q, k, v, *, out, **options):
        seen.append((q, k, v, out, options.get("mask")))
        return attend(q, k, v, out=out, **options)

    monkeypatch.setattr(sdpa, "attend", spy)
    query, key, value = inputs((2, 3, 4, 7, 16), (2, 1, 1, 9, 16), (9, 16))
    mask = masks((3, 1, 7, 9), "bool")
    out = scaled_dot_product_attention(query, key, value, mask)
    assert len(seen) == 2  # key cannot be joined over both axes
    for call in seen:
        for x, whole in zip(call, (query, key, value, out, mask), strict=True):
            assert x.ndim == 4 and np.may_share_memory(x, whole)
        assert call[1].shape == (3, 1, 9, 16)  # one head, read by all
    seen.clear()
    scaled_dot_product_attention(query, key[:, 0, 0][:1], value)
    assert [call[0].shape for call in seen] == [(6, 4, 7, 16)]


def test_inputs_are_not_written():
    arrays = [*inputs((2, 4, 7, 16), (2, 1, 9, 16), (2, 1, 9, 16)), masks((7, 9), "bool")]
    for x in arrays:
        x.flags.writeable = False
    assert scaled_dot_product_attention(*arrays).flags.writeable


GOOD = {"query": random(2, 4, 7, 16), "key": random(2, 4, 9, 16), "value": random(2, 4, 9, 16)}
TWO = {"key": random(2, 2, 9, 16), "value": random(2, 2, 9, 16)}
BAD = {
    "a list": (TypeError, {"query": [[0.0]]}, ["query: expected a NumPy array", "list"]),
    "None": (TypeError, {"value": None}, ["value: ", "NoneType"]),
    "float64": (TypeError, {"query": np.zeros((2, 4, 7, 16))}, ["query: expected float32", "float64", "reference"]),
    "key float64": (TypeError, {"key": np.zeros((2, 4, 9, 16))}, ["key: expected float32", "float64"]),
    "two dtypes": (TypeError, {"value": GOOD["value"].astype("f2")}, ["value: expected float32 as query", "float16"]),
    "value big-endian": (TypeError, {"value": np.zeros((2, 4, 9, 16), ">f4")}, ["value: expected float32", ">f4"]),
    "masked array": (TypeError, {"key": np.ma.zeros((2, 4, 9, 16), F32)}, ["key: ", "MaskedArray"]),
    "one axis": (ValueError, {"query": random(16)}, ["query: expected at least 2 dimensions", "(16,)"]),
    "head_dim": (ValueError, {"key": random(2, 4, 9, 15)}, ["key: expected (..., Lk, 16)", "(2, 4, 9, 15)"]),
    "head_dim 0": (ValueError, {"query": random(2, 4, 7, 0)}, ["query: ", "(2, 4, 7, 0)"]),
    "length of value": (ValueError, {"value": random(2, 4, 8, 16)}, ["value: expected (..., 9, Dv)", "(2, 4, 8, 16)"]),
    "no columns": (ValueError, {"value": random(2, 4, 9, 0)}, ["value: ", "(2, 4, 9, 0)"]),
    "heads": (ValueError, TWO, ["leading axes", "(2, 4, 7, 16)", "(2, 2, 9, 16)", "enable_gqa=True"]),
    "heads do not divide": (ValueError, {"key": random(2, 3, 9, 16), "value": random(2, 3, 9, 16), "enable_gqa": True},
                            ["key: ", "divides query's 4", "got 3"]),
    "heads of value": (ValueError, {"key": random(2, 2, 9, 16), "enable_gqa": True}, ["value: expected 2 heads", "4"]),
    "no kv heads": (ValueError, {"key": random(2, 0, 9, 16), "value": random(2, 0, 9, 16), "enable_gqa": True},
                    ["key: ", "got 0"]),
    "gqa of two axes": (ValueError, {"key": random(9, 16), "enable_gqa": True}, ["key: ", "(..., H, L, D)", "(9, 16)"]),
    "batch": (ValueError, {"key": random(3, 4, 9, 16)}, ["leading axes", "(3, 4, 9, 16)"]),
    "mask and causal": (ValueError, {"attn_mask": np.ones((7, 9), bool), "is_causal": True}, ["attn_mask: ", "causal"]),
    "mask a list": (TypeError, {"attn_mask": [True]}, ["attn_mask: expected a NumPy array", "list"]),
    "mask float64": (TypeError, {"attn_mask": np.zeros((7, 9))}, ["attn_mask: ", "bool", "float32", "float64"]),
    "mask integer": (TypeError, {"attn_mask": np.zeros((7, 9), int)}, ["attn_mask: ", "int64"]),
    "mask shape": (ValueError, {"attn_mask": np.ones((7, 8), bool)}, ["attn_mask: ", "(2, 4, 7, 9)", "(7, 8)"]),
    "mask of more axes": (ValueError, {"attn_mask": np.ones((1, 2, 4, 7, 9), bool)}, ["attn_mask: ", "(1, 2, 4, "]),
    "dropout": (NotImplementedError, {"dropout_p": 0.1}, ["dropout_p: ", "0.1"]),
    "dropout negative": (ValueError, {"dropout_p": -0.1}, ["dropout_p: ", "-0.1"]),
    "causal": (ValueError, {"is_causal": "no"}, ["is_causal: expected True or False", "'no'"]),
    "gqa": (ValueError, {"enable_gqa": 1}, ["enable_gqa: expected True or False", "1"]),
    "scale": (ValueError, {"scale": float("nan")}, ["scale: ", "nan"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, change, parts = BAD[name]
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(**(GOOD | change))
    for part in parts:
        assert part in str(caught.value), (part, str(caught.value))


def test_signature_is_torch_s():
    """torch documents it in these words."""
    import inspect

    expected = "(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)"
    assert str(inspect.signature(cyflash.scaled_dot_product_attention)) == expected
    torch = pytest.importorskip("torch")
    said = " ".join(torch.nn.functional.scaled_dot_product_attention.__doc__.split())
    assert expected.removesuffix(")") in said
