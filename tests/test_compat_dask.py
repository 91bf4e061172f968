"""cyflash.compat.dask on real clusters: worker processes, some of which die; what comes out is the same to the bit."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from calibrating import bits, state

import cyflash
from cyflash.arrays import Shape
from cyflash.attention import attend
from cyflash.capture import save_capture
from cyflash.plan import make_plan
from cyflash.quant import Calibrator

pytest.importorskip("distributed", reason='needs the extra "dask"')
import dask
import dask.array
import dask.bag
import dask_tasks as tasks
from distributed import Client, LocalCluster

from cyflash.compat import dask as on_dask
from cyflash.compat import dask_cluster

WORKERS = 3


@contextlib.contextmanager
def cluster_of(workers=WORKERS, **options):
    options = {"threads_per_worker": 1, "dashboard_address": ":0", "silence_logs": 60} | options
    with LocalCluster(n_workers=workers, **options) as cluster, Client(cluster) as client:
        yield client


@pytest.fixture(scope="module")
def client():
    with cluster_of() as client:
        yield client


@pytest.fixture
def captures(tmp_path):
    """Three files of the same two layers."""
    return [
        save_capture(tmp_path / f"{i}.npz", {"a": tasks.arrays(10 * i), "b": tasks.arrays(10 * i + 1)}, causal=True)
        for i in range(3)
    ]


# --- Calibration ------------------------------------------------------------------------------------------------------


def observed_here(paths, **options):
    calibrator = Calibrator()
    for path in paths:
        capture = cyflash.capture.load_capture(path)
        for name in capture:
            calibrator.observe(name, *capture[name], **{**capture.options, **options})
    return calibrator


def test_files_are_observed_to_the_bit(client, captures, tmp_path):
    here, there = observed_here(captures), Calibrator()
    assert on_dask.observe(there, captures, client=client) is there
    assert state(there, tmp_path) == state(here, tmp_path)
    assert there.summary()[0]["observations"] == 3
    assert bits(there.compute("max")) == bits(here.compute("max"))


def test_options_win_over_those_of_a_file(client, captures, tmp_path):
    there = on_dask.observe(Calibrator(), captures, client=client, causal=False, window=(3, 0))
    assert state(there, tmp_path) == state(observed_here(captures, causal=False, window=(3, 0)), tmp_path)
    assert state(there, tmp_path) != state(observed_here(captures), tmp_path)


def test_layers_are_renamed_and_axes_turned(client, tmp_path):
    x = tasks.arrays(0)
    path = save_capture(tmp_path / "x.npz", {"text.a": tuple(one.swapaxes(0, 1) for one in x)})
    there = on_dask.observe(Calibrator(), [path], client=client, layout="blhd", rename=[(r".*\.(\w)", r"layer_\1")])
    here = Calibrator()
    here.observe("layer_a", *x)
    assert state(there, tmp_path) == state(here, tmp_path)


def test_settings_are_those_of_the_calibrator(client, tmp_path):
    settings = {"granularity": "head", "fp32_sinks": 2, "smooth_k": True, "reservoir_mb": 1, "seed": 3}
    there = on_dask.observe(Calibrator(**settings), [client.submit(tasks.entry, 0)], client=client)
    here = Calibrator(**settings)
    here.observe(*tasks.entry(0))
    assert state(there, tmp_path) == state(here, tmp_path)


def sources(client):
    yield client.map(tasks.entries, range(5), pure=False)
    yield [dask.delayed(tasks.entries)(seed) for seed in range(5)]
    yield dask.bag.from_sequence([one for seed in range(5) for one in tasks.entries(seed)], npartitions=3)
    yield [client.submit(tasks.entries, 0), *(dask.delayed(tasks.entries)(seed) for seed in range(1, 5))]


@pytest.mark.parametrize("which", range(4), ids=["futures", "delayed", "bag", "both"])
def test_what_holds_entries(client, tmp_path, which):
    here = Calibrator()
    for seed in range(5):
        for layer, q, k, v, *options in tasks.entries(seed):
            here.observe(layer, q, k, v, **(options[0] if options else {}))
    there = on_dask.observe(Calibrator(), [*sources(client)][which])
    assert there.layers == ("layer0", "layer1")
    assert state(there, tmp_path) == state(here, tmp_path)


def test_what_was_observed_before_stays(client, tmp_path):
    there, here = Calibrator(), Calibrator()
    for calibrator in (there, here):
        calibrator.observe(*tasks.entry(0))
    here.observe(*tasks.entry(1))
    on_dask.observe(there, [client.submit(tasks.entry, 1)], client=client)
    assert state(there, tmp_path) == state(here, tmp_path)
    assert on_dask.observe(there, [], client=client) is there
    assert state(there, tmp_path) == state(here, tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (["none.npz"], FileNotFoundError, "none.npz: no such file"),
        ("none.npz", TypeError, "source: expected a list of files"),
        ([3], TypeError, r"source\[0\]: expected a path, a Future"),
        (lambda c: c.submit(tasks.value, 3), TypeError, "source: expected a list"),
        (lambda c: [c.submit(tasks.entry, 0), c.submit(tasks.value, 3)], TypeError, r"source\[1\]: expected entries"),
        (lambda c: [c.submit(tasks.value, [("a", 1, 2)])], TypeError, r"source\[0\]: expected entries"),
        (lambda c: [c.submit(tasks.value, ("a", *np.ones((3, 2, 4))))], TypeError, r"source\[0\]: layer 'a': q: expec"),
        (lambda c: [c.submit(tasks.entry, i, H=1 + i) for i in (0, 1)], ValueError, "layer 'layer0': expected 1 heads"),
        (lambda c: dask.array.ones(3), TypeError, "source: expected a list or a Bag, got a dask Array"),
    ],
)
def test_a_bad_source_is_named_and_nothing_is_taken_in(client, source, error, text, tmp_path):
    calibrator = Calibrator()
    with pytest.raises(error, match=text):
        on_dask.observe(calibrator, source(client) if callable(source) else source, client=client)
    assert calibrator.layers == ()


def test_bad_arguments_of_observe(client):
    with pytest.raises(TypeError, match="calibrator: expected a Calibrator, got dict"):
        on_dask.observe({}, [], client=client)
    with pytest.raises(ValueError, match="rename: expected"):
        on_dask.observe(Calibrator(), [], client=client, rename=["a"])
    with pytest.raises(ValueError, match="rename: expected"):
        on_dask.observe(Calibrator(), [], client=client, rename=[("(", "a")])
    with pytest.raises(ValueError, match="timeout: expected"):
        on_dask.observe(Calibrator(), [], client=client, timeout=0)
    with pytest.raises(ValueError, match="progress: expected"):
        on_dask.observe(Calibrator(), [], client=client, progress="yes")


# --- Attention --------------------------------------------------------------------------------------------------------

B, H, HK, LQ, LK, D = 2, 4, 2, 37, 150, 16
CUTS = ((0, 50), (50, 64), (64, 64), (64, 150))  # one is empty
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def qkv():
    r = np.random.default_rng(5)
    shapes = ((B, H, LQ, D), (B, HK, LK, D), (B, HK, LK, D))
    return tuple(2 * r.standard_normal(shape, dtype=np.float32) for shape in shapes)


def many(*shape, seed=9):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


OPTIONS = {
    "causal": {"causal": True},
    "causal top-left": {"causal": True, "causal_align": "top-left"},
    "window": {"window": (20, 5)},
    "window that skips shards": {"window": (7, 0), "causal_align": "top-left"},
    "scale": {"scale": 0.1},
    "softcap": {"softcap": 2.0},
    "bias": {"bias": many(H, LQ, LK)},
    "bias of rows": {"bias": many(LQ, 1)},
    "mask": {"mask": many(LK) > 0},
    "mask of a row": {"mask": many(B, 1, LQ, LK) > 0},
    "alibi": {"alibi_slopes": [0.5, 0.25, 0.1, 0.02]},
    "alibi top-left": {"alibi_slopes": [0.5, 0.25, 0.1, 0.02], "causal_align": "top-left"},
    "sinks": {"sinks": [1.0, 2.0, 3.0, 4.0]},
    "sinks, first shard not seen": {"sinks": [1.0, 2.0, 3.0, 4.0], "window": (9, 3), "causal": True},
    "config": {"config": cyflash.FlashAttentionConfig(head_dim=D, num_heads=H, causal=True, scale=0.3)},
    "together": {
        "causal": True, "window": (90, 5), "softcap": 5.0, "bias": many(LQ, LK), "mask": many(LK) > -1,
        "alibi_slopes": [0.5, 0.25, 0.1, 0.02], "sinks": [1.0, 2.0, 3.0, 4.0],
    },
}  # fmt: skip


def shards_of(client, k, v, cuts=CUTS):
    return [client.submit(tasks.pair, k[..., a:b, :], v[..., a:b, :]) for a, b in cuts]


def reference(q, k, v, **options):
    config = options.pop("config", None)
    if config is not None:
        options |= {"causal": config.causal, "scale": config.scale}
    return cyflash.reference.attention(q, k, v, return_lse=True, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(client, qkv, name):
    options = OPTIONS[name]
    expected, lse = reference(*qkv, **options)
    for option in options if "causal_align" not in options else ["causal_align"]:
        rest = {key: x for key, x in options.items() if key != option}
        changed = np.abs(reference(*qkv, **rest)[0] - expected).max()
        if not (option in ("bias", "sinks") and name == "bias of rows"):  # which moves all scores of a row
            assert changed > 100 * TOLERANCE, option
    shards = shards_of(client, *qkv[1:])
    out, got_lse = on_dask.flash_attention(qkv[0], shards, client=client, return_lse=True, **options)
    assert out.dtype == np.float32 and out.shape == expected.shape and got_lse.dtype == np.float32
    assert np.abs(out - expected).max() < TOLERANCE
    assert np.abs(got_lse - lse).max() < TOLERANCE * 10


def test_what_a_bias_of_rows_moves(client, qkv):
    """The LSE, not the output."""
    rows = OPTIONS["bias of rows"]["bias"]
    (_, with_rows), (_, without) = (reference(*qkv, **options) for options in ({"bias": rows}, {}))
    assert np.abs(with_rows - without).max() > 1


def test_a_row_that_sees_nothing(client, qkv):
    q, k, v = qkv
    out, lse = on_dask.flash_attention(
        q, shards_of(client, k, v), client=client, causal=True, window=(3, 0), return_lse=True,
        mask=np.arange(LK) < LK - LQ // 2,
    )  # fmt: skip
    assert (out[..., -5:, :] == 0).all() and (lse[..., -5:] == -np.inf).all()
    assert (out[..., :5, :] != 0).all()


def test_more_queries_than_keys_and_no_keys(client, qkv):
    q, k, v = (x[0, :2, :n] for x, n in zip(qkv, (37, 20, 20), strict=True))
    cuts = ((0, 7), (7, 20))
    out = on_dask.flash_attention(q, shards_of(client, k, v, cuts), client=client, causal=True)
    assert np.abs(out - cyflash.reference.attention(q, k, v, causal=True)).max() < TOLERANCE
    shards = shards_of(client, k, v, ((0, 0),))
    out, lse = on_dask.flash_attention(q, shards, client=client, return_lse=True, sinks=[1, 2])
    assert (out == 0).all() and (lse == np.array([[1.0], [2.0]])).all()
    out = on_dask.flash_attention(q[:, :0], shards_of(client, k, v, cuts), client=client, causal=True)
    assert out.shape == (2, 0, 16)


def whats_of(client, k, v):
    """Every way to pass shards."""
    pieces = [(k[..., a:b, :], v[..., a:b, :]) for a, b in CUTS]
    yield pieces
    yield [(client.submit(tasks.value, a), client.submit(tasks.value, b)) for a, b in pieces]
    yield [dask.delayed(tasks.pair)(a, b) for a, b in pieces]
    yield [(dask.delayed(a), client.submit(tasks.value, b)) for a, b in pieces]
    chunks = (2, 2, tuple(b - a for a, b in CUTS), 16)
    yield tuple(dask.array.from_array(x, chunks=chunks) for x in (k, v))
    yield tuple(dask.array.from_array(x, chunks=chunks).persist() for x in (k, v))


def test_all_that_holds_shards_gives_the_same_bits(client, qkv):
    q, k, v = qkv
    first, *others = [
        on_dask.flash_attention(q, shards, client=client, causal=True) for shards in whats_of(client, k, v)
    ]
    assert len(others) == 5
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits(client, qkv, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v = (x.astype(dtype) for x in qkv)
    out = on_dask.flash_attention(q, shards_of(client, k, v), client=client, causal=True)
    exact = cyflash.reference.attention(*(x.astype(np.float32) for x in (q, k, v)), causal=True)
    assert out.dtype == dtype
    once = np.abs(exact) * (2.0**-11 if dtype == "float16" else 2.0**-8)  # rounded once; float32 differs a little too
    assert (np.abs(out.astype(np.float64) - exact) <= 1.02 * once + TOLERANCE).all()


class Recorded:
    """Stands for `attend` where workers are threads."""

    def __init__(self):
        self.calls = []

    def __call__(self, q, k, v, **options):
        self.calls.append((k.shape, options))
        return attend(q, k, v, **options)


def test_shards_see_no_mask_and_unseen_shards_are_left_alone(qkv, monkeypatch):
    q, k, v = qkv
    recorded = Recorded()
    monkeypatch.setattr(on_dask, "attend", recorded)
    cuts = [(i, i + 30) for i in range(0, 150, 30)]
    with cluster_of(1, processes=False) as client:
        shards = shards_of(client, k, v, cuts)
        on_dask.flash_attention(q[:, :, :5], shards, client=client, causal=True, window=(40, 0), num_threads=1)
        assert sorted(options["offset"] for _, options in recorded.calls) == [145 - 120, 145 - 90]  # of five
        assert all(options["mask"] is None and options["bias"] is None for _, options in recorded.calls)
        assert all(options["num_threads"] == 1 for _, options in recorded.calls)
        recorded.calls.clear()
        on_dask.flash_attention(q, shards, client=client, causal=True, mask=np.ones((LQ, LK), bool))
        assert len(recorded.calls) == 5  # the first query stands at 113, but sees all that is before it
        assert {options["mask"].shape for _, options in recorded.calls} == {(LQ, 30)}


@pytest.mark.parametrize("align", ["bottom-right", "top-left"])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 0), (2, 4), (-1, 2), (6, -1)])
@pytest.mark.parametrize("causal", [False, True])
def test_shards_that_are_seen_are_those_with_a_visible_key(align, window, causal):
    lengths = [3, 0, 4, 1, 5]
    for queries in (1, 2, 9):
        shape = Shape((1, sum(lengths), 4))
        plan = make_plan(np.ones((1, queries, 4), "f"), shape, shape, causal=causal, window=window, causal_align=align)
        distance = np.arange(queries)[:, None] + plan.offset - np.arange(sum(lengths))
        visible = ((distance <= plan.left) & (-distance <= plan.right)).any(axis=0)
        stops = np.cumsum(lengths).tolist()
        places = [(i, stop - lengths[i], stop) for i, stop in enumerate(stops)]
        expected = [(i, start, stop) for i, start, stop in places if visible[start:stop].any()]
        assert on_dask._seen(plan, lengths) == (expected or [(0, 0, 3)])


@pytest.mark.parametrize(
    ("offset", "options"),
    [(offset, options) for offset in (-400, -60, -10, 0, 3, 40, 65, 90, 500)
     for options in ({"causal": True}, {"window": (9, 4)}, {"alibi_slopes": [0.3, 0.1]}, {})],
)  # fmt: skip
def test_a_piece_at_any_place(offset, options):
    """The engine's own offset, against the same pairs as a mask and a bias."""
    q, k, v = tasks.arrays(3, Lq=70, Lk=50)
    distance = np.arange(70)[:, None] + offset - np.arange(50)
    mask = np.ones((70, 50), bool)
    if "causal" in options:
        mask = distance >= 0
    if "window" in options:
        mask = (distance <= 9) & (distance >= -4)
    bias = -np.array(options.get("alibi_slopes", [0, 0]))[:, None, None] * np.abs(distance)
    expected, lse = cyflash.reference.attention(q, k, v, mask=mask, bias=bias.astype(np.float32), return_lse=True)
    out, got, _ = attend(q, k, v, offset=offset, return_lse=True, **options)
    assert np.abs(out - expected).max() < 3e-5  # scores of up to 150 are rounded
    assert np.array_equal(np.isneginf(got), np.isneginf(lse))
    assert np.allclose(got, lse, rtol=0, atol=5e-5)


def arrays_of(*shapes, dtype=np.float32):
    return tuple(np.ones(shape, dtype) for shape in shapes)


@pytest.mark.parametrize(
    ("shards", "error", "text"),
    [
        ([], TypeError, "shards: expected a list of"),
        ("kv", TypeError, "shards: expected a list of"),
        ([3], TypeError, r"shards\[0\]: expected \(k, v\)"),
        ([arrays_of((2, 5, 8), (2, 5, 8), (2, 5, 8))], TypeError, r"shards\[0\]: expected \(k, v\)"),
        ([arrays_of((2, 5, 8), (2, 5, 8), dtype=float)], TypeError, r"shards\[0\]: k: expected float32"),
        ([arrays_of((5, 8), (5, 8))], ValueError, r"shards\[0\]: k: expected 3 axes as in q"),
        ([arrays_of((2, 5, 8), (2, 4, 8))], ValueError, r"shards\[0\]: expected k and v of one length"),
        ([arrays_of((2, 5, 8), (2, 5, 8)), arrays_of((1, 5, 8), (1, 5, 8))], ValueError, r"shards\[1\]: k: expected"),
        ([arrays_of((2, 5, 4), (2, 5, 8))], ValueError, "k: expected .* with D=8 as in q"),
        ([arrays_of((3, 5, 8), (3, 5, 8))], ValueError, "k: expected a number of heads that divides"),
        (lambda: tuple(dask.array.ones((2, 8, 8), chunks=(1, 4, 8)) for _ in "kv"),
         ValueError, r"k\.rechunk\({0: -1, 2: -1}\)"),
        (lambda: (dask.array.ones((2, 8, 8), chunks=(2, 4, 8)), dask.array.ones((2, 8, 8), chunks=(2, 8, 8))),
         ValueError, "v: expected k's chunks"),
    ],
)  # fmt: skip
def test_bad_shards(client, shards, error, text):
    with pytest.raises(error, match=text):
        q = np.ones((2, 3, 8), np.float32)
        on_dask.flash_attention(q, shards() if callable(shards) else shards, client=client)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"causal": "yes"}, ValueError, "causal: expected"),
        ({"causal_align": "left"}, ValueError, "causal_align: expected"),
        ({"window": 3}, ValueError, "window: expected"),
        ({"mask": np.ones(7, bool)}, ValueError, r"mask: expected .* \(2, 3, 10\)"),
        ({"bias": np.ones(10)}, TypeError, "bias: expected float32"),
        ({"sinks": [1.0, 2, 3]}, ValueError, "sinks: expected"),
        ({"config": cyflash.FlashAttentionConfig(head_dim=4)}, ValueError, "config: expected head_dim 8"),
        ({"config": cyflash.FlashAttentionConfig(head_dim=8, dropout_p=0.5)}, NotImplementedError, "dropout"),
    ],
)
def test_bad_options(client, options, error, text):
    q, k, v = (np.ones((2, n, 8), np.float32) for n in (3, 5, 5))
    with pytest.raises(error, match=text):
        on_dask.flash_attention(q, [(k, v), (k, v)], client=client, **options)


# --- Clusters that suffer ---------------------------------------------------------------------------------------------


def kill_a_worker(folder):
    """Kill the process of a task that runs, as soon as there is one; its number."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for path in Path(folder).iterdir():
            pid = int(path.name.rpartition(".")[2])
            os.kill(pid, signal.SIGKILL)
            return pid
        time.sleep(0.01)
    raise AssertionError("no task has begun")


class Killer(threading.Thread):
    def __init__(self, folder):
        super().__init__()
        self.folder, self.pid = folder, None
        self.start()

    def run(self):
        self.pid = kill_a_worker(self.folder)

    def joined(self):
        """The process that was killed, and those that ran tasks afterwards."""
        self.join()
        return self.pid, {int(path.name.rpartition(".")[2]) for path in Path(self.folder).iterdir()} - {self.pid}


def test_a_killed_worker_changes_no_bit_of_a_calibration(tmp_path):
    undisturbed, folder = Calibrator(), tmp_path / "running"
    folder.mkdir()
    with cluster_of() as client:
        on_dask.observe(undisturbed, [client.submit(tasks.entry, seed) for seed in range(9)], client=client)
        killer = Killer(folder)
        source = client.map(tasks.slow_entry, range(9), folder=folder, seconds=0.1, pure=False)
        disturbed = on_dask.observe(Calibrator(), source, client=client)
    killed, others = killer.joined()
    again = {path.name.partition(".")[0] for path in folder.iterdir() if path.name.endswith(f".{killed}")}
    assert again and others
    assert all(any((folder / f"{seed}.{pid}").exists() for pid in others) for seed in again)  # by another worker
    assert disturbed.summary()[0]["observations"] == 9
    assert state(disturbed, tmp_path) == state(undisturbed, tmp_path)


def test_a_killed_worker_changes_no_bit_of_attention(qkv, tmp_path):
    q, k, v = qkv
    cuts = [(i, i + 15) for i in range(0, 150, 15)]
    with cluster_of() as client:
        undisturbed = on_dask.flash_attention(q, shards_of(client, k, v, cuts), client=client, causal=True)
        killer = Killer(tmp_path)
        slow = [
            client.submit(tasks.slow_pair, k[:, :, a:b], v[:, :, a:b], tmp_path, 0.1, pure=False) for a, b in cuts
        ]
        disturbed = on_dask.flash_attention(q, slow, client=client, causal=True)
    _, others = killer.joined()
    assert others and len(list(tmp_path.iterdir())) > len(cuts)  # some were computed again
    assert np.array_equal(disturbed, undisturbed)


def test_a_piece_that_kills_every_worker_is_named():
    with cluster_of(1) as client:
        client.cluster.scheduler.allowed_failures = 0
        with pytest.raises(RuntimeError, match=r"client: the task die-.* was lost with 1 workers"):
            on_dask.observe(Calibrator(), [client.submit(tasks.die)], client=client)


def test_scattered_shards_cannot_come_back(qkv):
    _, k, v = qkv
    with cluster_of(1) as client:
        shard = client.scatter((k, v))
        with contextlib.suppress(Exception):
            client.submit(tasks.die, retries=0).result()
        with pytest.raises(RuntimeError, match=r"client: data that this call reads are gone .* scattered"):
            on_dask.flash_attention(qkv[0], [shard], client=client, timeout=20)


def test_a_cluster_without_workers():
    with cluster_of(0) as client:
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match="has had no worker for 1 s"):
            on_dask.observe(Calibrator(), [dask.delayed(tasks.entry)(0)], client=client, timeout=1)
        assert time.monotonic() < begun + 20


def scheduler_process(tmp_path):
    file = tmp_path / "scheduler.json"
    code = "from distributed.cli.dask_scheduler import main; main()"
    command = [sys.executable, "-c", code, "--port", "0", "--no-dashboard", "--host", "127.0.0.1", "--scheduler-file"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen([*command, file], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if file.exists() and file.stat().st_size:
            return process, file
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the scheduler has not begun")


def test_a_dead_cluster(tmp_path):
    """The scheduler goes while a call waits, and is gone before the next."""
    process, file = scheduler_process(tmp_path)
    try:
        with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
            client = Client(scheduler_file=str(file), timeout=20)
            address = client.scheduler.address
            timer = threading.Timer(1.0, process.kill)
            timer.start()
            with pytest.raises(RuntimeError, match=f"client: the scheduler at {address} is gone"):
                on_dask.observe(Calibrator(), [dask.delayed(tasks.entry)(0)], client=client)
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"client: (the scheduler at .* is gone|expected a connected)"):
                    on_dask.flash_attention(np.ones((3, 4), "f"), [arrays_of((3, 4), (3, 4))], client=client)
            client.close(timeout=1)
    finally:
        process.kill()
        process.wait()


def test_what_is_no_client(client):
    with pytest.raises(TypeError, match=r"client: expected a distributed\.Client, got str"):
        on_dask.observe(Calibrator(), [], client="tcp://127.0.0.1:8786")
    code = (
        "from cyflash.compat import dask; from cyflash.quant import Calibrator\n"
        "try: dask.observe(Calibrator(), [])\n"
        "except ValueError as error: print(error)"
    )
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert got.stdout.startswith("client: expected a distributed.Client, got None")
    with Client(client.cluster) as other:
        pass
    with pytest.raises(RuntimeError, match="client: expected a connected one, got one that is closed"):
        on_dask.observe(Calibrator(), [], client=other)


# --- What a person sees -----------------------------------------------------------------------------------------------


def test_a_bar_on_a_terminal_only(client, captures, monkeypatch, capsys):
    from rich.console import Console
    from rich.progress import Progress

    terminal, tasks_seen = io.StringIO(), []

    class Shown(Progress):
        def __exit__(self, *error):
            tasks_seen.extend((task.description, task.completed, task.total) for task in self.tasks)
            return super().__exit__(*error)

    on_dask.observe(Calibrator(), captures, client=client, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(
        dask_cluster, "progress_bar", lambda: Shown(console=Console(file=terminal, force_terminal=True, width=80))
    )
    on_dask.observe(Calibrator(), captures, client=client)
    assert not terminal.getvalue()
    on_dask.observe(Calibrator(), captures, client=client, progress=True)
    assert "observing" in terminal.getvalue()
    # three files are listed; six layers are observed and merged: six pieces in two, and these in one
    assert tasks_seen == [("observing", 3, 3), ("observing", 9, 9)]


def test_without_dask_the_extra_is_named():
    code = "import sys; sys.modules['distributed'] = None\nimport cyflash.compat.dask"
    got = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: cyflash.compat.dask needs Dask; install it with: pip install 'cyflash-attn[dask]'" in " ".join(
        got.stderr.split()
    )
