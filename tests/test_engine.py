"""The engine: FlashAttentionConfig, FlashAttention, FlashAttentionOutput, MemorySavings.

The first two groups are the tests of the two Rust engines that this one grew from, under the names they have there
(the int8 one belongs to the int8 path). What they compare with a naive attention is compared with float64 here, by the
derived bound.
"""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from bounds import Case

import cyflash
from cyflash import FlashAttention, FlashAttentionConfig, FlashAttentionOutput, MemorySavings, cpu
from cyflash.attention import attend
from cyflash.flops import attention_flops


def assert_is_attention(result, q, k, v, **options):
    Case(q, k, v, **options).check(result.output, result.logsumexp)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# --- The tests of the first Rust engine -------------------------------------------------------------------------------


def test_flash_attention_basic():
    D, L = 4, 8
    engine = FlashAttention(FlashAttentionConfig(head_dim=D, num_heads=1, block_size_q=4, block_size_kv=4))
    qkv = 0.1 * np.arange(L * D, dtype=np.float32).reshape(L, D)
    assert_is_attention(engine.forward(qkv, qkv, qkv), qkv, qkv, qkv)


def test_flash_attention_causal():
    D, L = 4, 6
    engine = FlashAttention(FlashAttentionConfig.new(D, 1).with_causal(True))
    steps = np.arange(L * D).reshape(L, D)
    q, v = 0.1 * (steps % 7).astype(np.float32), 0.2 * (steps % 5).astype(np.float32)
    result = engine.forward(q, q, v)
    assert result.output.shape == (L, D)
    assert not np.isnan(result.output).any()
    np.testing.assert_allclose(result.output[0], v[0], rtol=1e-6)  # the first row attends to itself only
    assert_is_attention(result, q, q, v, causal=True)


def test_flash_attention_memory_savings():
    engine = FlashAttention(FlashAttentionConfig.new(64, 8))
    savings, larger = engine.memory_savings(2048), engine.memory_savings(8192)
    assert savings.reduction_factor > 10
    assert larger.reduction_factor > savings.reduction_factor


def test_flash_attention_multi_head():
    B, H, L, D = 1, 2, 4, 4
    engine = FlashAttention(FlashAttentionConfig.new(D, H))
    q = 0.01 * np.arange(B * H * L * D, dtype=np.float32).reshape(B, H, L, D)
    result = engine.forward_multi_head(q, q, q)
    assert result.output.shape == (B, H, L, D)
    assert result.logsumexp.shape == (B, H, L)
    assert_is_attention(result, q, q, q)


def test_flash_attention_flops():
    D, L = 64, 128
    q = np.full((L, D), 0.1, np.float32)
    assert FlashAttention(FlashAttentionConfig.new(D, 1)).forward(q, q, q).flops == 4 * L * L * D


def test_flash_attention_dimension_error():
    engine = FlashAttention(FlashAttentionConfig.new(4, 1))
    k = np.full((1, 4), 0.1, np.float32)
    with pytest.raises(ValueError, match="head_dim"):
        engine.forward(np.full((1, 7), 0.1, np.float32), k, k)
    with pytest.raises(ValueError, match=r"q: expected \(L, D\)"):
        engine.forward(np.full(7, 0.1, np.float32), k, k)


def test_flash_attention_single_token():
    D = 8
    q, v = np.ones((1, D), np.float32), np.arange(D, dtype=np.float32).reshape(1, D)
    result = FlashAttention(FlashAttentionConfig.new(D, 1)).forward(q, q, v)
    np.testing.assert_allclose(result.output, v, rtol=1e-6)  # the softmax of one score is 1


# --- The tests of the second Rust engine ------------------------------------------------------------------------------


def test_flash_attention_vs_naive_small():
    q, k, v = random(16, 8, seed=1), random(16, 8, seed=2), random(16, 8, seed=3)
    assert_is_attention(FlashAttention(FlashAttentionConfig.for_head_dim(8)).forward(q, k, v), q, k, v)


def test_flash_attention_causal_vs_naive():
    q, k, v = random(150, 16, seed=1), random(150, 16, seed=2), random(150, 16, seed=3)
    engine = FlashAttention(FlashAttentionConfig.for_head_dim(16).with_causal(True))
    assert_is_attention(engine.forward(q, k, v), q, k, v, causal=True)


def test_flash_attention_different_seq_lengths():
    q, k, v = random(5, 32, seed=1), random(200, 32, seed=2), random(200, 32, seed=3)
    engine = FlashAttention(FlashAttentionConfig.for_long_sequence(32))
    assert_is_attention(engine.forward(q, k, v), q, k, v)
    assert_is_attention(engine.forward(k, q, q), k, q, q)


def test_flash_mha():
    H, L, D = 4, 33, 16
    q, k, v = random(H, L, D, seed=1), random(H, L, D, seed=2), random(H, L, D, seed=3)
    engine = FlashAttention(FlashAttentionConfig.new(D, H))
    result = engine.forward_multi_head(q, k, v)
    assert_is_attention(result, q, k, v)
    for h in range(H):
        alone = engine.forward(q[h], k[h], v[h])
        assert np.array_equal(alone.output, result.output[h])
        assert np.array_equal(alone.logsumexp, result.logsumexp[h])


@pytest.mark.parametrize("order", ["rising", "falling", "huge"])
def test_online_softmax_state(order):
    """The running maximum and sum are right when every block of keys moves them, when none does, and far from 0."""
    scores = {"rising": np.arange(640) / 8, "falling": -np.arange(640) / 8, "huge": 1e4 + np.arange(640)}[order]
    q = np.ones((1, 1), np.float32)
    k, v = scores.astype(np.float32)[:, None], random(640, 3)
    for keys in (8, 64, 1024):
        engine = FlashAttention(FlashAttentionConfig(head_dim=1, num_heads=1, block_size_kv=keys))
        assert_is_attention(engine.forward(q, k, v), q, k, v)


# --- Output -----------------------------------------------------------------------------------------------------------


def test_output_reports_what_the_call_took():
    q, k, v = random(2, 6, 300, 24), random(2, 3, 270, 24), random(2, 3, 270, 40)
    result = FlashAttention(FlashAttentionConfig.new(24, 6)).forward_multi_head(q, k, v, window=(9, 2))
    assert isinstance(result, FlashAttentionOutput)
    assert result.output.shape == (2, 6, 300, 40)
    assert result.flops == attention_flops(2, 6, 300, 270, 24, 40, window=(9, 2))
    assert (result.block_size_q, result.block_size_kv) == cpu.tile_sizes(64, 64)
    assert result.peak_tile_bytes == cpu.tile_bytes(result.block_size_q, result.block_size_kv, 24, 40)
    assert result.implementation == cyflash.cpu_info()["implementation"]


def test_output_is_that_of_flash_attention():
    q, k, v = random(3, 80, 32, seed=1), random(3, 80, 32, seed=2), random(3, 80, 32, seed=3)
    config = FlashAttentionConfig.new(32, 3)
    result = FlashAttention(config).forward_multi_head(q, k, v, softcap=2.0)
    output, logsumexp = cyflash.flash_attention(q, k, v, config=config, softcap=2.0, return_lse=True)
    assert np.array_equal(result.output, output)
    assert np.array_equal(result.logsumexp, logsumexp)


def test_implementation_is_the_one_that_ran():
    q = random(10, 16)
    engine = FlashAttention(FlashAttentionConfig.new(16, 1))
    for name in cpu.runnable():
        with cyflash.set_implementation(name):
            assert engine.forward(q, q, q).implementation == name


# --- Configuration: every field works ---------------------------------------------------------------------------------


def test_head_dim_must_be_that_of_q():
    q = random(4, 16)
    with pytest.raises(ValueError, match=r"head_dim.*8.*16|head_dim.*16.*8"):
        cyflash.flash_attention(q, q, q, config=FlashAttentionConfig.new(8, 1))


def test_num_heads_is_checked_by_forward_multi_head_only():
    q, config = random(2, 4, 16), FlashAttentionConfig.new(16, 8)
    cyflash.flash_attention(q, q, q, config=config)
    with pytest.raises(ValueError, match=r"H=8 .*got \(2, 4, 16\).*transpose"):
        FlashAttention(config).forward_multi_head(q, q, q)


@pytest.mark.parametrize("sizes", [(1, 1), (32, 128), (100, 100), (300, 32)])
def test_block_sizes_are_used_and_reported_as_rounded(sizes):
    q = random(700, 16)
    config = FlashAttentionConfig(head_dim=16, block_size_q=sizes[0], block_size_kv=sizes[1])
    _, _, work = attend(q, q, q, config=config)
    used = (work.block_size_q, work.block_size_kv)
    assert used == cpu.tile_sizes(*sizes)
    assert cpu.tile_sizes(*used) == used
    _, _, default = attend(q, q, q)
    assert (work.tile_bytes == default.tile_bytes) == (used == (default.block_size_q, default.block_size_kv))


def test_causal_of_the_config_is_used_and_a_given_one_wins():
    q = random(20, 16)
    config = FlashAttentionConfig.new(16, 1).with_causal(True)
    causal, full = (cyflash.flash_attention(q, q, q, causal=c) for c in (True, False))
    assert not np.allclose(causal, full)
    np.testing.assert_allclose(cyflash.flash_attention(q, q, q, config=config), causal, rtol=1e-5, atol=1e-6)
    given = cyflash.flash_attention(q, q, q, config=config, causal=False)
    np.testing.assert_allclose(given, full, rtol=1e-5, atol=1e-6)


def test_scale_of_the_config_is_used_and_a_given_one_wins():
    q, k, v = random(20, 16, seed=1), random(20, 16, seed=2), random(20, 16, seed=3)
    engine = FlashAttention(FlashAttentionConfig(head_dim=16, num_heads=1, scale=0.9))
    assert_is_attention(engine.forward(q, k, v), q, k, v, scale=0.9)
    assert_is_attention(engine.forward(q, k, v, scale=0.1), q, k, v, scale=0.1)


def test_dropout_of_the_config_raises_at_the_call_and_a_given_zero_wins():
    q = random(4, 16)
    engine = FlashAttention(FlashAttentionConfig.new(16, 1).with_dropout(0.1))
    with pytest.raises(NotImplementedError, match="dropout_p"):
        engine.forward(q, q, q)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        cyflash.flash_attention(q, q, q, config=engine.config)
    assert_is_attention(engine.forward(q, q, q, dropout_p=0.0), q, q, q)


# --- Configuration: construction --------------------------------------------------------------------------------------


def test_constructors():
    assert FlashAttentionConfig() == FlashAttentionConfig(64, 8, 64, 64, False, None, 0.0)
    assert FlashAttentionConfig.new(128, 4) == FlashAttentionConfig(head_dim=128, num_heads=4)
    assert FlashAttentionConfig.for_head_dim(96) == FlashAttentionConfig(96, 8, 64, 64)
    assert FlashAttentionConfig.for_long_sequence(96) == FlashAttentionConfig(96, 8, 32, 128)


def test_softmax_scale():
    assert FlashAttentionConfig.new(64, 1).softmax_scale() == 0.125
    assert FlashAttentionConfig(scale=0.3).softmax_scale() == 0.3
    assert FlashAttentionConfig(scale=0.0).softmax_scale() == 0.0


def test_config_is_immutable_and_with_methods_copy():
    config = FlashAttentionConfig.new(32, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.causal = True
    causal, dropping = config.with_causal(True), config.with_dropout(0.25)
    assert (causal.causal, dropping.dropout_p) == (True, 0.25)
    assert config == FlashAttentionConfig.new(32, 2)
    assert causal.with_causal(False) == dropping.with_dropout(0.0) == config
    assert pickle.loads(pickle.dumps(causal)) == copy.deepcopy(causal) == causal
    assert len({config, causal, FlashAttentionConfig.new(32, 2)}) == 2


def test_numpy_scalars_become_python_numbers():
    config = FlashAttentionConfig(head_dim=np.int64(32), causal=np.True_, scale=np.float32(0.5))
    assert [type(x) for x in (config.head_dim, config.causal, config.scale)] == [int, bool, float]


@pytest.mark.parametrize("field", ["head_dim", "num_heads", "block_size_q", "block_size_kv"])
@pytest.mark.parametrize("value", [0, -64, 64.0, "64", True, None])
def test_a_count_is_a_positive_integer(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected an integer of at least 1, got {value!r}$"):
        FlashAttentionConfig(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(causal="yes"), "causal: expected True or False, got 'yes'"),
        (dict(causal=1), "causal: expected True or False, got 1"),
        (dict(scale="auto"), "scale: expected a finite number, got 'auto'"),
        (dict(scale=float("nan")), "scale: expected a finite number, got nan"),
        (dict(scale=float("inf")), "scale: expected a finite number, got inf"),
        (dict(dropout_p=None), "dropout_p: expected a finite number, got None"),
        (dict(dropout_p=-0.1), "dropout_p: expected 0 <= dropout_p < 1, got -0.1"),
        (dict(dropout_p=1.0), "dropout_p: expected 0 <= dropout_p < 1, got 1.0"),
    ],
)
def test_other_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FlashAttentionConfig(**fields)


def test_the_engine_takes_a_config_and_the_right_ranks():
    with pytest.raises(TypeError, match="config: expected a FlashAttentionConfig, got dict"):
        FlashAttention({"head_dim": 64})
    engine, x = FlashAttention(FlashAttentionConfig.new(16, 2)), random(2, 4, 16)
    with pytest.raises(ValueError, match=r"q: expected \(L, D\), got \(2, 4, 16\); use forward_multi_head"):
        engine.forward(x, x, x)
    with pytest.raises(ValueError, match=r"q: expected \(H, L, D\) or .*, got \(4, 16\); use forward"):
        engine.forward_multi_head(x[0], x[0], x[0])


def test_unknown_options_of_the_engine_are_named():
    q = random(4, 16)
    engine = FlashAttention(FlashAttentionConfig.new(16, 1))
    with pytest.raises(TypeError, match=r"attn_mask: expected an option of flash_attention .*causal, .*num_threads"):
        engine.forward(q, q, q, attn_mask=None)
    with pytest.raises(TypeError, match=r"config: the engine has its own; .*FlashAttention"):
        engine.forward(q, q, q, config=FlashAttentionConfig.new(16, 2))
    with pytest.raises(TypeError, match=r"return_lse: .*always.*logsumexp"):
        engine.forward_multi_head(q[None], q[None], q[None], return_lse=False)


# --- Configuration from this machine ----------------------------------------------------------------------------------


def auto(monkeypatch, D, l1, l2, threads=1, **options):
    info = {"caches": {"l1d": l1, "l2": l2, "l3": None}, "threads": threads}
    monkeypatch.setattr("cyflash.config.cpu_info", lambda: info)
    return FlashAttentionConfig.auto(D, **options)


KIB = 1024


@pytest.mark.parametrize("D", [1, 32, 64, 80, 128, 256, 512])
def test_auto_gives_sizes_that_are_used_as_they_are(D):
    config = FlashAttentionConfig.auto(D)
    q, k, v = random(600, D, seed=1), random(600, D, seed=2), random(600, D, seed=3)
    result = FlashAttention(config).forward(q, k, v)
    assert (result.block_size_q, result.block_size_kv) == (config.block_size_q, config.block_size_kv)
    assert_is_attention(result, q, k, v)


@pytest.mark.parametrize("l2", [256 * KIB, 1024 * KIB, 2048 * KIB])
@pytest.mark.parametrize("D", [64, 128])
def test_auto_fills_half_of_l2(monkeypatch, D, l2):
    config = auto(monkeypatch, D, 32 * KIB, l2)
    Br, Bc = config.block_size_q, config.block_size_kv
    panel, _ = cpu.tile_sizes(1, 1)

    def bytes_with(rows):
        return cpu.tile_bytes(rows, Bc, D, D) + 8 * Bc * D

    assert bytes_with(Br) <= l2 / 2 or Br == panel
    assert Br + panel > 512 or bytes_with(Br + panel) > l2 / 2


def test_auto_takes_more_keys_with_more_l1_and_fewer_with_larger_heads(monkeypatch):
    cases = ((64, 16 * KIB), (64, 512 * KIB), (256, 512 * KIB))
    small, large, large_heads = (auto(monkeypatch, D, l1, 1024 * KIB).block_size_kv for D, l1 in cases)
    assert small < large > large_heads


def test_auto_works_where_caches_are_unknown(monkeypatch):
    assert auto(monkeypatch, 64, None, None) == auto(monkeypatch, 64, 32 * KIB, 256 * KIB)


def test_auto_keeps_every_thread_busy(monkeypatch):
    free = auto(monkeypatch, 64, 32 * KIB, 4096 * KIB)
    tied = auto(monkeypatch, 64, 32 * KIB, 4096 * KIB, seq_len=1024, threads=16)
    assert tied.block_size_q < free.block_size_q
    tasks = 8 * -(-1024 // tied.block_size_q)
    assert tasks >= 4 * 16
    panel, _ = cpu.tile_sizes(1, 1)
    assert auto(monkeypatch, 64, 32 * KIB, 4096 * KIB, seq_len=1).block_size_q == panel


def test_auto_refuses_other_precisions_and_bad_counts():
    with pytest.raises(NotImplementedError, match="precision: 'int8' is not available; available: 'fp32'"):
        FlashAttentionConfig.auto(64, precision="int8")
    with pytest.raises(ValueError, match="seq_len: expected an integer of at least 1, got 0"):
        FlashAttentionConfig.auto(64, seq_len=0)
    with pytest.raises(ValueError, match="head_dim: expected an integer of at least 1, got 0"):
        FlashAttentionConfig.auto(0)


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 10, 100, 500])
def test_memory_savings_are_what_the_engine_holds(L):
    engine = FlashAttention(FlashAttentionConfig.for_long_sequence(32))
    q = random(L, 32)
    result = engine.forward(q, q, q)
    savings = engine.memory_savings(L)
    assert savings.naive_bytes == 4 * L * L
    assert savings.flash_bytes == result.peak_tile_bytes + result.logsumexp.nbytes
    assert savings.reduction_factor == savings.naive_bytes / savings.flash_bytes
    assert savings.seq_len == L


def test_memory_savings_read_like_a_sentence():
    savings = MemorySavings(naive_bytes=67_108_864, flash_bytes=81_920, reduction_factor=819.2, seq_len=4096)
    assert str(savings) == "seq_len=4096: naive=64.0MB, flash=80.0KB, 819x reduction"


@pytest.mark.parametrize("seq_len", [0, -1, 10.0])
def test_memory_savings_need_a_length(seq_len):
    with pytest.raises(ValueError, match=f"^seq_len: expected an integer of at least 1, got {seq_len}$"):
        FlashAttention(FlashAttentionConfig()).memory_savings(seq_len)
