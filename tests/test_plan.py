"""Calibrator.plan: each kv head in the cheapest arithmetic that keeps to an error; saved and run as other scales."""
import json

import numpy as np
import pytest
from calibrating import bits, calibrated, long_tailed, normal

import cyflash
from cyflash.quant import Calibrator, LayerScales, Scales, planning
from cyflash.quant.tiles import Reservoir

INT8, HELPED, BF16, FP32 = range(4)  # the ladder


def rung_of(part):
    """How far up the ladder the LayerScales of a part stands."""
    if part is None:
        return FP32
    assert isinstance(part, LayerScales) and part.parts is None
    if part.pv != "int8":
        return BF16
    return HELPED if part.fp32_sinks or part.k_mean is not None or part.v_scale is None else INT8


def rungs(layer, kv_heads):
    """{kv head: rung} of a planned layer, in which each stands exactly once."""
    if layer.parts is None:
        return dict.fromkeys(range(kv_heads), rung_of(layer))
    found = [(head, rung_of(part)) for heads, part in layer.parts for head in heads]
    assert sorted(head for head, _ in found) == list(range(kv_heads))
    assert all(list(heads) == sorted(heads) for heads, _ in layer.parts)
    return dict(found)


@pytest.fixture(autouse=True, scope="module")
def costs_rise_along_the_ladder():
    """Times of small calls say nothing, and a test may not depend on times: here each rung costs more than the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_times", lambda tile, ladder: [1.0 + i for i in range(len(ladder))])
        yield


def head_errors(tile, layer):
    """(relative L1, worst row) of each kv head: those of the worst query head of its group."""
    exact = cyflash.reference.attention(*tile[:3], **tile.options)
    off = np.abs(cyflash.flash_attention_int8(*tile[:3], quant=layer, **tile.options) - exact).sum(axis=-1)
    size = np.abs(exact).sum(axis=-1)  # (H, rows)
    worst = (off / np.maximum(size, size.mean(axis=-1, keepdims=True))).max(axis=-1)
    rel_l1 = off.sum(axis=-1) / size.sum(axis=-1)
    return tuple(x.reshape(len(tile.k), -1).max(axis=-1) for x in (rel_l1, worst))


# Heads that are known to need something


def plain_head(r, L, D):
    return tuple(r.standard_normal((L, D), dtype=np.float32) for _ in "qkv")


def biased_head(r, L, D):
    """Keys with a large common part: smooth-K."""
    q, k, v = plain_head(r, L, D)
    return q, k + np.where(np.arange(D) % 2, np.float32(40), np.float32(-40)), v


def sink_head(r, L, D):
    """The first keys are far out, take most of the weight and hold little: fp32 sinks, or V per token."""
    q, k, v = plain_head(r, L, D)
    q[:, 0], k[:, 0] = 4, 0
    k[:4] *= 20
    k[:4, 0] = 15
    v[:4] *= np.float32(0.02)
    return q * np.float32(0.5), k, v


def cancelling_head(r, L, D):
    """Tokens come in pairs of one key and large opposite values in some channels: int8 loses what remains of V."""
    q, k, v = plain_head(r, L, D)
    k[1::2] = k[::2]
    large = np.where(np.arange(D) % 8 == 0, 60, 0) * r.choice([-1, 1], (L // 2, 1))
    v[::2] += large.astype(np.float32)
    v[1::2] -= large.astype(np.float32)
    return q * np.float32(0.3), k, v


def sharp_head(r, L, D):
    """Scores of hundreds, near ties among them: nothing but fp32."""
    q, k, v = plain_head(r, L, D)
    return q * np.float32(150), k, v


PLANTED = {  # how it is made, the rungs that are right
    "plain": (plain_head, (INT8, HELPED)),
    "biased keys": (biased_head, (HELPED,)),
    "sinks": (sink_head, (HELPED,)),
    "cancelling values": (cancelling_head, (BF16,)),
    "sharp": (sharp_head, (FP32,)),
}


def planted_model(makers, n=2, L=128, D=32):
    for seed in range(n):
        r = np.random.default_rng([seed, 21])
        yield tuple(np.stack(x) for x in zip(*(make(r, L, D) for make in makers), strict=True))


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_head_gets_what_it_needs_and_the_others_stay_int8(name):
    make, right = PLANTED[name]
    calibrator = calibrated(*planted_model((plain_head, make, plain_head)), granularity="head")
    layer = calibrator.plan(rel_l1=0.05, worst=0.3)["layer"]
    found = rungs(layer, 3)
    assert found[1] in right
    assert found[0] == found[2] == INT8


def test_planted_heads_side_by_side():
    calibrator = calibrated(*planted_model([make for make, _ in PLANTED.values()]), granularity="head")
    layer = calibrator.plan(rel_l1=0.05, worst=0.3)["layer"]
    found = rungs(layer, len(PLANTED))
    for head, (name, (_, right)) in enumerate(PLANTED.items()):
        assert found[head] in right, name
    (tile,) = calibrator.tiles("layer")[1]
    rel_l1, worst = head_errors(tile, layer)
    assert rel_l1.max() <= 0.05 and worst.max() <= 0.3


def test_one_scale_per_tensor_still_leaves_a_plain_layer_in_int8():
    calibrator = calibrated(*planted_model((plain_head, plain_head)))
    layer = calibrator.plan(rel_l1=0.05, worst=0.3)["layer"]
    assert rungs(layer, 2) == {0: INT8, 1: INT8}


# The target


@pytest.fixture(scope="module")
def mixed():
    """Four kv heads of two query heads, one with biased keys, one with sharp scores."""
    seen = []
    for seed in range(2):
        q, k, v = normal(seed, H=8, Hk=4, Lq=80, D=32)
        k[1] += 30
        q[4:6] *= 6
        seen.append((q, k, v))
    return calibrated(*seen, options={"causal": True})


TARGETS = ((0.3, 3.0), (0.05, 0.5), (0.022, 0.1), (0.01, 0.05), (1e-3, 5e-3))


@pytest.fixture(scope="module")
def plans(mixed):
    return [mixed.plan(rel_l1=rel_l1, worst=worst) for rel_l1, worst in TARGETS]


@pytest.mark.parametrize("i", range(len(TARGETS)))
def test_held_out_tiles_meet_the_target_head_by_head(mixed, plans, i):
    (tile,) = mixed.tiles("layer")[1]
    rel_l1, worst = head_errors(tile, plans[i]["layer"])
    assert (rel_l1 <= TARGETS[i][0] * 1.0001).all(), rel_l1
    assert (worst <= TARGETS[i][1] * 1.0001).all(), worst


def test_a_tighter_target_takes_no_cheaper_rung(plans):
    chosen = [rungs(plan["layer"], 4) for plan in plans]
    for head in range(4):
        climbed = [rung[head] for rung in chosen]
        assert climbed == sorted(climbed), head
    assert set(chosen[-1].values()) == {FP32}
    assert min(chosen[0].values()) < FP32
    assert len({tuple(rung.values()) for rung in chosen}) > 2


def test_the_worst_row_alone_can_decide(mixed, plans):
    loose = rungs(mixed.plan(rel_l1=0.3, worst=10.0)["layer"], 4)
    strict = rungs(mixed.plan(rel_l1=0.3, worst=1e-4)["layer"], 4)
    assert set(strict.values()) == {FP32} and set(loose.values()) != {FP32}


def test_all_the_plan_says_of_its_parts_is_so(mixed, plans):
    (tile,) = mixed.tiles("layer")[1]
    for plan in plans:
        layer, told = plan["layer"], plan.about["layer"]["parts"]
        json.dumps(plan.about)
        rel_l1, worst = head_errors(tile, layer)
        assert sorted(head for part in told for head in part["kv_heads"]) == [0, 1, 2, 3]
        if layer.parts is not None:
            assert [tuple(part["kv_heads"]) for part in told] == [tuple(heads) for heads, _ in layer.parts]
        for part in told:
            heads = list(part["kv_heads"])
            assert part["worst"] == pytest.approx(worst[heads].max(), rel=1e-4)
            assert part["rel_l1"] == pytest.approx(rel_l1[heads].max(), rel=1e-4)
            assert part["rung"] and isinstance(part["rung"], str)
            assert part["time"] > 0
    assert plans[-1].about["layer"]["parts"][0]["time"] == pytest.approx(1.0, abs=0.5)  # fp32 beside fp32


def test_heads_of_one_setting_share_a_part(plans):
    for plan in plans:
        layer = plan["layer"]
        if layer.parts is not None:
            kinds = [rung_of(part) for _, part in layer.parts]
            assert kinds.count(FP32) <= 1
            assert len(layer.parts) <= 4


@pytest.mark.parametrize("targets", [{"rel_l1": 1e-9, "worst": 1.0}, {"rel_l1": 1.0, "worst": 1e-9}])
def test_a_target_that_nothing_reaches_lists_heads_and_errors(targets):
    calibrator = Calibrator()
    for name in ("dec.0", "dec.1"):
        for seed in range(2):
            calibrator.observe(name, *normal(seed, H=4, Hk=2, Lq=50, D=32))
    with pytest.raises(ValueError) as error:
        calibrator.plan(**targets)
    message = str(error.value)
    assert all(word in message for word in ("dec.0", "dec.1", "1e-09", "0", "1")), message
    assert "e-0" in message.replace("1e-09", "")  # the errors that fp32 reaches


def test_the_held_out_part_alone_decides(monkeypatch, mixed):
    """Garbage in the held-out tiles that int8 cannot represent turns every head to fp32."""
    real = Reservoir.halves

    def spoiled(self):
        training, held_out = real(self)
        return training, [tile._replace(q=tile.q * np.float32(1000)) for tile in held_out]

    calm = rungs(mixed.plan(rel_l1=0.1, worst=1.0)["layer"], 4)
    monkeypatch.setattr(Reservoir, "halves", spoiled)
    found = rungs(mixed.plan(rel_l1=0.1, worst=1.0)["layer"], 4)
    assert set(found.values()) == {FP32} and set(calm.values()) != {FP32}


# Running it


def test_a_plan_runs_as_its_heads_would_alone(mixed, plans):
    q, k, v = long_tailed(9, H=8, Hk=4, Lq=50, D=32)
    for plan in plans:
        layer = plan["layer"]
        out, lse = cyflash.flash_attention_int8(q, k, v, quant=layer, causal=True, return_lse=True)
        for heads, part in layer.parts or [(range(4), layer)]:
            rows = [2 * head + i for head in heads for i in range(2)]
            own = q[rows], k[list(heads)], v[list(heads)]
            if part is None:
                alone = cyflash.flash_attention(*own, causal=True, return_lse=True)
            else:
                alone = cyflash.flash_attention_int8(*own, quant=part, causal=True, return_lse=True)
            np.testing.assert_array_equal(out[rows], alone[0])
            np.testing.assert_array_equal(lse[rows], alone[1])


def test_a_plan_is_saved_and_loaded_with_all_its_bits(tmp_path, mixed, plans):
    q, k, v = long_tailed(9, H=8, Hk=4, Lq=50, D=32)
    for i, plan in enumerate(plans):
        path = plan.save(tmp_path / f"{i}.safetensors")
        loaded = Scales.load(path)
        assert bits(loaded) == bits(plan)
        assert loaded.about == plan.about and loaded.settings == plan.settings
        assert loaded.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
        outputs = [cyflash.flash_attention_int8(q, k, v, quant=x["layer"], causal=True) for x in (plan, loaded)]
        np.testing.assert_array_equal(*outputs)


def test_the_choice_does_not_depend_on_the_order_of_observations():
    seen = [long_tailed(seed, H=4, Hk=2, Lq=60, D=16) for seed in range(4)]
    plans = [calibrated(*order).plan(rel_l1=0.05, worst=0.6) for order in (seen, seen[::-1])]
    assert bits(plans[0]) == bits(plans[1])


@pytest.mark.parametrize("granularity", ["tensor", "head"])
@pytest.mark.parametrize("settings", [{}, {"fp32_sinks": 2}, {"smooth_k": True}, {"smooth_k": False}])
def test_every_setting_can_be_planned(granularity, settings):
    calibrator = calibrated(*(long_tailed(seed, H=4, Hk=2, Lq=40, D=16) for seed in range(2)),
                            granularity=granularity, **settings)
    plan = calibrator.plan(rel_l1=0.03, worst=0.5)
    (tile,) = calibrator.tiles("layer")[1]
    rel_l1, worst = head_errors(tile, plan["layer"])
    assert rel_l1.max() <= 0.03 * 1.0001 and worst.max() <= 0.5 * 1.0001


@pytest.mark.parametrize("arguments", [{"rel_l1": 0.0}, {"rel_l1": -1.0}, {"worst": np.nan}, {"worst": "0.1"}])
def test_targets_are_checked(mixed, arguments):
    (name,) = arguments
    with pytest.raises((TypeError, ValueError), match=name):
        mixed.plan(**arguments)
