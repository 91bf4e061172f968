"""Caches in files: everything comes back, to the bit; no file that is damaged or foreign becomes a cache."""
import json

import numpy as np
import pytest
import safetensors.numpy
from caching import DTYPES, DV, FLOATS, HK, D, H, attend, make, make_paged, same_bits, tokens, verify

import cyflash
from cyflash import KVCache, LayerScales, PagedKVCache
from cyflash.quant import quantize

MEAN = np.linspace(-1, 1, HK * D, dtype=np.float32).reshape(HK, 1, D)
PER_HEAD = {"k_scale": np.full((HK, 1, 1), 0.03, np.float32), "v_scale": np.full((HK, 1, 1), 0.02, np.float32)}
KINDS = {
    **{dtype: (dtype, {}) for dtype in FLOATS},
    "int8": ("int8", {}),
    "int8 mean and sinks": ("int8", {"k_mean": MEAN, "fp32_sinks": 5}),
    "int8 head": ("int8", {"granularity": "head", **PER_HEAD}),
    "int8 tensor": ("int8", {"granularity": "tensor", "k_scale": 0.03, "v_scale": 0.02}),
    "int8 quant": ("int8", {"quant": LayerScales(**PER_HEAD, k_mean=MEAN, fp32_sinks=3, pv="fp32")}),
    "window": ("float32", {"window": (20, 0)}),
    "int8 window and sinks": ("int8", {"window": (20, 0), "fp32_sinks": 7}),
    "grow": ("float16", {"grow": True}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache.safetensors"


def some(dtype, settings):
    """A cache that has had a life: rows of 60, 7 and 0 tokens, in two pieces of memory at least; and its oracle."""
    cache, oracle = make(3, 64, dtype, **settings)
    _, k, v = tokens(64, 3)
    for start, stop, lengths in ((0, 40, [40, 9, 3]), (40, 62, [22, 11, 0])):
        now = np.s_[:, :, start:stop]
        cache.append(k[now], v[now], lengths=lengths), oracle.append(k[now], v[now], lengths=lengths)
    for one in (cache, oracle):
        one.truncate([20], rows=[1])
        one.reset(rows=[2])
    return cache, oracle


def test_everything_comes_back(one_build, kind, path, tmp_path):
    cache, oracle = some(*kind)
    cache.save(path)
    loaded = KVCache.load(path)
    assert type(loaded) is KVCache
    assert loaded.lengths.dtype == np.int64 and loaded.lengths.tolist() == [62, 20, 0]
    assert loaded.capacity == cache.capacity and loaded.dtype == cache.dtype
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    q, k, v = tokens(64, 3)
    same_bits(attend(q[:, :, :2], loaded), attend(q[:, :, :2], cache))
    now = np.s_[:, :, 62:64]
    verify(loaded, oracle, q[now], k[now], v[now])
    same_bits(attend(q[:, :, :1], loaded), (attend(q[now], cache, k[now], v[now]), attend(q[:, :, :1], cache))[1])


def test_settings_come_back(path):
    """Capacity, growth and window hold in the loaded cache as in the saved one."""
    _, k, v = tokens(64, 3)
    for name in KINDS:
        dtype, settings = KINDS[name]
        some(dtype, settings)[0].save(path)
        loaded = KVCache.load(path)
        rest = 64 - 62 if "window" not in settings else 64 - 20
        loaded.append(k[:1, :, :rest], v[:1, :, :rest], rows=[0])
        if settings.get("grow"):
            loaded.append(k, v)
        else:
            with pytest.raises(ValueError, match="capacity"):
                loaded.append(k, v)
        if "window" in settings:
            with pytest.raises(ValueError, match="window"):
                attend(tokens(1, 3)[0], loaded, window=(21, 0))


def test_a_loaded_cache_is_its_own(path):
    cache, oracle = some("float32", {})
    cache.save(path)
    loaded = KVCache.load(path)
    path.unlink()
    loaded.reset()
    q, _, _ = tokens(3, 3)
    verify(cache, oracle, q)


def test_an_empty_cache(kind, path):
    cache, oracle = make(3, 64, kind[0], **kind[1])
    cache.save(path)
    loaded = KVCache.load(path)
    q, k, v = tokens(64, 3)
    verify(loaded, oracle, q, k, v, bound=False)


def test_shared_pages_come_back(path):
    for dtype in DTYPES:
        cache, oracle = some(dtype, {})
        cache.reorder([0, 0, 1]), oracle.reorder([0, 0, 1])
        cache.save(path)
        loaded = KVCache.load(path)
        q, k, v = tokens(2, 3)
        verify(loaded, oracle, q, k, v, bound=False)


def test_only_what_is_used_is_stored(path):
    """A few tokens in a large cache are a small file; what was truncated is not in it."""
    cache, _ = make(4, 4096)
    _, k, v = tokens(300, 4)
    secret = np.full_like(k, 12345.678)
    cache.append(secret, v)
    cache.truncate([10, 0, 0, 0])
    cache.append(k[:, :, :1], v[:, :, :1])
    cache.save(path)
    assert path.stat().st_size < cache.nbytes / 4
    cache, _ = make(1, 4096)
    cache.append(secret[:1], v[:1])
    cache.reset()
    cache.append(k[:1, :, :3], v[:1, :, :3])
    cache.save(path)
    assert np.float32(12345.678).tobytes() not in path.read_bytes()


def test_what_a_window_gave_up_is_not_stored(path):
    """Nor is it where its page still has tokens that are seen."""
    cache, _ = make(1, 64, window=(20, 0))
    _, k, v = tokens(24, 1)
    k[:, :, :3] = 12345.678
    for t in range(24):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
    cache.save(path)
    assert k[0, 0, 5, 0].tobytes() in path.read_bytes()
    assert np.float32(12345.678).tobytes() not in path.read_bytes()


def test_the_same_contents_are_the_same_bytes(kind, path):
    """However they came in; and saving changes nothing."""
    if "window" in kind[1]:
        pytest.skip("what a window has given up depends on the appends")
    _, k, v = tokens(64, 3)
    files = []
    for chunks in ([40], [1] * 40, [13, 27]):
        cache, _ = make(3, 64, kind[0], **kind[1])
        start = 0
        for n in chunks:
            cache.append(k[:, :, start : start + n], v[:, :, start : start + n])
            start += n
        for _ in range(2):
            cache.save(path)
            files.append(path.read_bytes())
    assert len(set(files)) == 1


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8 mean and sinks"])
def test_files_do_not_depend_on_the_build(name, path):
    """Each build writes the same bytes, and reads what another one wrote."""
    files, q = [], tokens(3, 3)[0]
    for build in cyflash.cpu.runnable():
        with cyflash.set_implementation(build):
            cache, oracle = some(*KINDS[name])
            cache.save(path)
            files.append(path.read_bytes())
    assert len(set(files)) == 1
    for build in cyflash.cpu.runnable():
        with cyflash.set_implementation(build):
            verify(KVCache.load(path), oracle, q)


def test_the_file_is_safetensors(kind, path):
    some(*kind)[0].save(path)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["format"].startswith("cyflash.")
        assert len(list(file.keys())) > 0


def test_paged(one_build, kind, path):
    settings = {name: value for name, value in kind[1].items() if name != "grow"}
    cache, oracle = make_paged(12, 16, kind[0], **settings)
    q, k, v = tokens(40, 2)
    a, b = cache.add(), cache.add()
    oracle.add(a), oracle.add(b)
    cache.append(k, v, rows=[a, b], lengths=[40, 7]), oracle.append(k, v, [a, b], [40, 7])
    c = cache.fork(a)
    oracle.fork(a, c)
    cache.free(b), oracle.free(b)
    cache.save(path)
    loaded = PagedKVCache.load(path)
    assert type(loaded) is PagedKVCache
    verify(loaded, oracle, q[:, :, :2], rows=[c, a])
    now = np.s_[:1, :, :5]
    verify(loaded, oracle, q[now], k[now], v[now], rows=[c])
    verify(loaded, oracle, q[:1, :, :2], rows=[a])
    d = loaded.add()
    oracle.add(d)
    verify(loaded, oracle, q[now], k[now], v[now], rows=[d])
    assert np.array_equal(np.asarray(loaded.block_table)[a], np.asarray(loaded.block_table)[a])


# What is no cache


def test_a_truncated_file(kind, path):
    """Cut anywhere: a ValueError that names the file."""
    some(*kind)[0].save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=path.name):
            KVCache.load(path)


def test_bytes_behind_the_end(path):
    some("float32", {})[0].save(path)
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    with pytest.raises(ValueError, match=path.name):
        KVCache.load(path)


def test_foreign_files(path, tmp_path):
    path.write_text("not a cache at all, but more than eight bytes")
    with pytest.raises(ValueError, match=path.name):
        KVCache.load(path)
    safetensors.numpy.save_file({"k": np.zeros((2, 2), np.float32)}, path)
    with pytest.raises(ValueError, match=path.name):
        KVCache.load(path)
    quantize(np.ones((4, 8), np.float32)).save(path)
    with pytest.raises(ValueError, match=path.name):
        KVCache.load(path)
    with pytest.raises(FileNotFoundError, match="none"):
        KVCache.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        KVCache.load(tmp_path / "cache.npz")


def test_one_kind_of_cache_is_not_the_other(path):
    """Either refused, or read as what it is: never as something else."""
    some("float32", {})[0].save(path)
    with pytest.raises(ValueError, match="KVCache"):
        PagedKVCache.load(path)
    cache, _ = make_paged(4, 16)
    cache.save(path)
    with pytest.raises(ValueError, match="KVCache"):
        KVCache.load(path)


def parts(path):
    """Metadata and tensors of a file, in a form that can be changed and written."""
    with safetensors.safe_open(path, "numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_refused(path, tensors, metadata, what):
    try:
        safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path, metadata)
    except Exception:  # it is the library that refuses, so there is no such file
        return
    with pytest.raises(ValueError, match=path.name):
        KVCache.load(path)
        pytest.fail(f"loaded: {what}")


@pytest.mark.parametrize("name", ["bfloat16", "int8 mean and sinks", "int8 head", "int8 window and sinks", "grow"])
def test_damaged_contents(name, path):
    """A tensor that is gone, of another shape or dtype; metadata that are gone or nonsense."""
    some(*KINDS[name])[0].save(path)
    metadata, tensors = parts(path)
    for tensor, x in tensors.items():
        rest = {other: y for other, y in tensors.items() if other != tensor}
        assert_refused(path, rest, metadata, f"without {tensor}")
        assert_refused(path, rest | {tensor: x.ravel()[:-1]}, metadata, f"{tensor} of another shape")
        assert_refused(path, rest | {tensor: x[None, None]}, metadata, f"{tensor} of another rank")
        assert_refused(path, rest | {tensor: np.zeros(x.shape, np.complex64)}, metadata, f"{tensor} of another dtype")
        if x.dtype.kind in "iu" and x.dtype.itemsize > 1 and x.size < 100:
            for value in (-1, 1 << 30, np.iinfo(x.dtype).max):
                assert_refused(path, rest | {tensor: np.full_like(x, value)}, metadata, f"{tensor} all {value}")
    assert_refused(path, tensors | {"more": np.zeros(3, np.float32)}, metadata, "one tensor more")
    for key in metadata:
        rest = {other: text for other, text in metadata.items() if other != key}
        assert_refused(path, tensors, rest, f"without {key}")
        for text in ("", "nonsense", "-1", "{}"):
            if text != metadata[key]:
                assert_refused(path, tensors, rest | {key: text}, f"{key} = {text!r}")


def test_numbers_that_no_cache_holds(path):
    """Scales of 0 or NaN, NaN in a mean."""
    some(*KINDS["int8 mean and sinks"])[0].save(path)
    metadata, tensors = parts(path)
    for tensor, x in tensors.items():
        if x.dtype == np.float32 and "scale" in tensor:
            for value in (0, -1, np.nan, np.inf):
                assert_refused(path, tensors | {tensor: np.full_like(x, value)}, metadata, f"{tensor} all {value}")
        if x.dtype == np.float32 and "mean" in tensor:
            assert_refused(path, tensors | {tensor: np.full_like(x, np.nan)}, metadata, f"{tensor} NaN")


def test_a_version_of_the_future(path):
    """What a later version writes is refused rather than misread, if the file says its version."""
    some("float32", {})[0].save(path)
    metadata, tensors = parts(path)
    for key, text in metadata.items():
        if "version" in key:
            assert_refused(path, tensors, metadata | {key: str(int(text) + 1)}, "a later version")
    assert json.dumps(metadata)


# Where it is written


def test_save_fails_cleanly(path, tmp_path):
    """A bad place is an error, and a file that was there before stays."""
    cache, oracle = some("float32", {})
    cache.save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="safetensors"):
        cache.save(tmp_path / "cache.bin")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        cache.save(tmp_path / "nowhere" / "cache.safetensors")
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    verify(cache, oracle, tokens(2, 3)[0])
    cache.append(*(x[:, :, :1] for x in tokens(1, 3)[1:]))
    cache.save(str(path))
    assert path.read_bytes() != before
    assert KVCache.load(str(path)).lengths.tolist() == cache.lengths.tolist()


def test_sizes(path):
    """The widths of a file's cache are its own."""
    cache = KVCache(1, 3, 40, 20, v_head_dim=7)
    k, v = np.ones((1, 3, 2, 40), np.float32), np.ones((1, 3, 2, 7), np.float32)
    cache.append(k, v)
    cache.save(path)
    loaded = KVCache.load(path)
    loaded.append(k, v)
    assert attend(np.ones((1, 3, 1, 40), np.float32), loaded)[0].shape == (1, 3, 1, 7)
    assert (H, DV) == (4, 20)
