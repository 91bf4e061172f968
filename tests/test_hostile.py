"""Files of others: what cannot be read is an error that names the file. All of it: `python -m tests.hostile`."""
import json
import os
import re
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hostile import __main__ as hostile
from hostile import child, variants
from hostile.readers import READERS, Reader

from cyflash import LayerScales, files
from cyflash.capture import load_capture

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process as Linux does")


def test_every_reader():
    """Cut, bent and made to harm: ValueError or OSError with the file's name, soon, within little memory."""
    counts, found = hostile.run(seed=0, most=12, timeout=300)
    assert not found, found[:5]
    assert set(counts) == set(READERS) and min(counts.values()) > 60


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_every_reader_at_length(name):
    counts, found = hostile.run(seed=0, most=5000, only=name)
    assert not found, found[:5]
    assert counts[name] > 400


# That a reader that is not careful is noticed


def read_all(path):
    return Path(path).read_bytes()


@pytest.mark.parametrize("read, fatal, why", [
    (read_all, True, "was read"),
    (lambda path: json_error(path, ""), True, "does not name the file"),
    (lambda path: json_error(path, str(path), KeyError), True, "KeyError"),
    (lambda path: json_error(path, str(path), RecursionError), True, "RecursionError"),
    (lambda path: [np.ones(1 << 23, np.uint8), json_error(path, str(path))], True, "bytes"),
    (lambda path: json_error(path, str(path)), True, None),
    (read_all, False, None),
])
def test_what_is_not_promised_is_noticed(tmp_path, read, fatal, why):
    path = tmp_path / "x.json"
    path.write_bytes(b"{}")
    tracemalloc.start()
    try:
        error, peak = child.peak_of(read, path)
    finally:
        tracemalloc.stop()
    found = child.wrong(Reader(None, read), "label", path, error, fatal, peak, 1 << 20)
    assert found is None if why is None else why in found


def json_error(path, message, kind=ValueError):
    raise kind(message)


# What was found


def test_a_kv_head_beyond_all_others_is_an_error_at_once():
    """Every head below it was looked for, one after the other."""
    with pytest.raises(ValueError, match="got none with 1"):
        LayerScales(parts=[([0], None), ([2**40], LayerScales(0.1, 0.2, 0.3))])


def test_json_that_is_too_deep_or_says_two_things():
    assert files.parsed_json('{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}
    with pytest.raises(ValueError, match="nested too deeply"):
        files.parsed_json("[" * 100_000)
    with pytest.raises(ValueError, match="'a' is there twice"):
        files.parsed_json('{"a": 1, "b": 2, "a": 3}')


@pytest.mark.timeout(60)
def test_json_of_many_names_does_not_hang():
    """It would take hours, if each name were looked for among all others."""
    many = ",".join(f'"{i}": 0' for i in range(200_000))
    with pytest.raises(ValueError, match="'199999' is there twice"):
        files.parsed_json(f'{{{many}, "199999": 1}}')


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_no_file(tmp_path, name):
    """It would be waited for: the observations of `cyflash calibrate` were."""
    reader = READERS[name]
    path = tmp_path / reader.name
    reader.make(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileNotFoundError, match=re.escape(reader.name)):
        reader.read(path)


def test_an_index_names_files_beside_it(tmp_path):
    """No others, wherever they are."""
    reader = READERS["vLLM's index"]
    path = tmp_path / reader.name
    reader.make(path)
    for name in ("/etc/x.safetensors", "../x.safetensors", 3, None, "a/b.safetensors"):
        path.write_text(json.dumps({"weight_map": {"a.k_scale": name}}))
        with pytest.raises(ValueError, match="weight_map: expected names of files beside it"):
            reader.read(path)


@pytest.mark.parametrize("field", ["kv_heads", "head_dim", "v_head_dim", "page_size", "fp32_sinks"])
def test_a_cache_is_no_larger_than_its_file(tmp_path, field):
    """Its numbers are compared with its tensors before arrays of that size are made."""
    reader = READERS["KVCache of codes"]
    path = tmp_path / reader.name
    reader.make(path)
    wanted = f"cache ('{field}',) = {2**31}"
    (data,) = (made for label, made, _ in variants.tampered_text(path.read_bytes(), "cache") if label == wanted)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=path.name):
        reader.read(path)


def test_npz_that_packs_too_well(tmp_path):
    """Zeros are read as long as they are few; a gigabyte of them in a megabyte is not unpacked."""
    path = tmp_path / "x.npz"
    x = np.zeros((1, 3000, 64), np.float32)
    np.savez_compressed(path, q=x, k=x, v=x)
    assert load_capture(path)["x"].q.shape == x.shape
    bomb = variants.Bomb(variants.npy((1, 1 << 22, 32)), 1 << 29, ("q", "k", "v"))
    bomb(path)
    with pytest.raises(ValueError, match=r"x\.npz: .*q\.npy unpacks from \d+ to \d+ bytes"):
        load_capture(path)


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_npz_packed_in_ways_that_unpack_more_than_asked_for(tmp_path, how):
    """A kilobyte of bzip2 is a gigabyte of zeros, at the first read of whatever size."""
    path = tmp_path / "x.npz"
    x = variants.npy((1, 3, 4), data=bytes(48))
    path.write_bytes(variants.npz({f"{name}.npy": x for name in "qkv"}, how))
    with pytest.raises(ValueError, match=r"x\.npz: .*q\.npy is packed in another way than numpy\.savez"):
        load_capture(path)


def test_npz_that_says_it_is_larger_than_its_file(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(variants.claiming(1 << 30))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"x\.npz: .*its members take more than the \d+ bytes of the file"):
        load_capture(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("change", [
    {"files": None}, {"layout": None}, {"files": {}}, {"files": [3]}, {"files": [{"name": "x", "size": 3}]},
    {"files": [{"name": 1, "size": 3, "sha256": "0"}]}, {"other": 1},
], ids=str)  # fmt: skip
def test_observations_with_other_metadata(tmp_path, change):
    """None: without it."""
    path = tmp_path / "x.safetensors"
    READERS["observations"].make(path)
    header, body = variants.parts(path.read_bytes())
    kept = json.loads(header["__metadata__"]["cyflash calibrate"])
    changed = {name: x for name, x in (kept | change).items() if x is not None}
    header["__metadata__"]["cyflash calibrate"] = json.dumps(changed)
    path.write_bytes(variants.safetensors(header, body))
    with pytest.raises(ValueError, match=r"x\.safetensors: cyflash calibrate: expected layout, options"):
        READERS["observations"].read(path)
