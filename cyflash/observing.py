"""What `cyflash calibrate` sees of its files, and keeps: one Calibrator and the list of the files that are in it.

    files -> observe_files(): a Calibrator for each, its layers shared out among processes
          -> Observations.take(): merged, and kept on disk before the next file

The file of an Observations is what Calibrator.save writes, with the list in its metadata: both change in one step, so
that an interrupted run counts no file twice. How files are shared out and in which order they come changes no bit.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import tempfile
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cyflash
from cyflash.capture import load_capture
from cyflash.cpu import threads
from cyflash.files import existing_file, open_safetensors, parsed_json, replacing
from cyflash.quant import Calibrator

__all__ = ["UNREADABLE", "How", "Observations", "identify", "observe_files", "observe_layers", "renamed", "renaming"]

UNREADABLE = (OSError, ValueError, TypeError)  # what a file can cause that leaves the others to be observed
KEY = "cyflash calibrate"  # of the metadata
KEPT = ("layout", "options", "renames", "files")  # there
OF_A_FILE = ("name", "size", "sha256")


class How(NamedTuple):
    """What the observations depend on, besides the files; JSON holds it, but for tuples that become lists."""

    settings: dict
    """Arguments of Calibrator."""
    layout: str
    options: dict
    """Of the attention; they win over those of a file."""
    renames: tuple = ()
    """(pattern, replacement) of the layers' names, one after the other."""

    def load(self, path):
        return load_capture(path, self.layout)


def identify(path):
    """What a file is known by: {"name", "size", "sha256"}. OSError where it cannot be read."""
    if not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for
        raise OSError(f"{path}: expected a file, got a pipe or a device")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"name": Path(path).name, "size": file.tell(), "sha256": digest}


def renaming(text):
    """OLD=NEW, for argparse, as (pattern, replacement)."""
    old, equals, new = text.rpartition("=")
    try:
        if not (old and equals):
            raise ValueError("expected OLD=NEW")
        re.compile(old + "|").sub(new, "")  # also a group that NEW names and OLD has not
    except (ValueError, re.error, IndexError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None
    return old, new


def renamed(name, renames):
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


# Observing


def observe_files(paths, how, workers):
    """Observe each file, on `workers` processes.

    Parameters
    ----------
    paths : list of Path
    how : How
    workers : int
        1: this process.

    Yields
    ------
    path : Path
        In the order given.
    result : Calibrator, or the error that this file caused
    """
    if workers == 1:
        for path in paths:
            try:
                yield path, observe_layers(path, how.load(path), how)
            except UNREADABLE as error:
                yield path, error
        return
    share = max(1, threads.count(None) // workers)
    executor = ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker, (share,))
    with tempfile.TemporaryDirectory() as folder:
        waiting, ahead = iter(paths), deque()
        try:
            while True:
                while len(ahead) <= workers and (path := next(waiting, None)) is not None:
                    ahead.append((path, _share_out(executor, path, how, workers, folder)))
                if not ahead:
                    break
                path, parts = ahead.popleft()
                yield path, _merged(parts, how)
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process was killed, perhaps for want of memory; what was observed before is kept: run again, "
                "with fewer --workers"
            ) from None
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def observe_layers(path, capture, how, names=None):
    """A Calibrator that has observed a file, or some of its layers."""
    calibrator = Calibrator(**how.settings)
    options = capture.options | how.options
    for name in capture if names is None else names:
        try:
            calibrator.observe(renamed(name, how.renames), *capture[name], **options)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None
    return calibrator


def _share_out(executor, path, how, workers, folder):
    """Submit a file's layers, by turns, to as many processes as there are; its tasks, or the error that it caused."""
    try:
        names = list(how.load(path))
    except UNREADABLE as error:
        return error
    shares = [names[i::workers] for i in range(min(workers, len(names)))]
    with _interrupts_later():  # submitting starts processes
        return [executor.submit(_observe_share, path, how, share, folder) for share in shares]


@contextmanager
def _interrupts_later():
    """Ctrl-C waits for the end of the block; processes that it starts never see it, not even while they start."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _merged(parts, how):
    """The Calibrator of a file from those of its shares, or the first error."""
    if isinstance(parts, Exception):
        return parts
    calibrator, error = Calibrator(**how.settings), None
    for part in parts:
        try:
            saved = part.result()
            if error is None:
                calibrator.merge(Calibrator.load(saved))
            saved.unlink()
        except UNREADABLE as one:
            error = error or one
    return error or calibrator


def _begin_worker(count):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    cyflash.set_num_threads(count)


def _observe_share(path, how, names, folder):
    """In a worker: observe these layers of a file; where that was saved."""
    calibrator = observe_layers(path, how.load(path), how, names)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".safetensors", delete=False) as file:
        saved = Path(file.name)
    return calibrator.save(saved)


# Keeping


class Observations:
    """All files observed so far, on disk after each.

    Attributes
    ----------
    calibrator : Calibrator
    files : list of dict
        What `identify` says of them, in order.
    """

    def __init__(self, path, how):
        self.path = path
        self.how = how
        self.calibrator = Calibrator(**how.settings)
        self.files = []

    @classmethod
    def resume(cls, path, how):
        """Those of an earlier run, or none; ValueError where it observed otherwise."""
        self = cls(path, how)
        if not path.exists():
            return self
        text = _metadata(path).get(KEY)
        if text is None:
            raise ValueError(f"{path}: expected the observations of an earlier cyflash calibrate, got another file")
        try:
            kept = parsed_json(text)
        except ValueError as error:
            raise ValueError(f"{path}: {KEY}: not JSON: {error}") from None
        if not _is_kept(kept):
            raise ValueError(f"{path}: {KEY}: expected {', '.join(KEPT)}, each file with its {', '.join(OF_A_FILE)}")
        calibrator = Calibrator.load(path)
        now = _as_kept(how) | {"settings": self.calibrator.settings}
        then = {name: kept[name] for name in KEPT if name != "files"} | {"settings": calibrator.settings}
        if different := _differences(then, now):
            raise ValueError(
                f"{path}: the observations of an earlier run are with other settings ({different}); pass --restart to "
                "observe all files again, or another -o"
            )
        self.calibrator, self.files = calibrator, kept["files"]
        return self

    def take(self, calibrator, file):
        """Merge what one file had, and write all; ValueError where its layers do not fit, with nothing changed."""
        try:
            self.calibrator.merge(calibrator)
        except ValueError as error:
            raise ValueError(str(error).removeprefix("other: ")) from None
        self.files = sorted([*self.files, file], key=lambda one: (one["name"], one["sha256"]))
        self.save()

    def save(self):
        text = json.dumps(_as_kept(self.how) | {"files": self.files}, sort_keys=True)
        with replacing(self.path) as temporary:
            plain = temporary.with_name(f"{temporary.name}.safetensors")
            try:
                _copy_with(self.calibrator.save(plain), temporary, KEY, text)
            finally:
                plain.unlink(missing_ok=True)


def _as_kept(how):
    """What is kept of a How beside the calibrator's own settings, as JSON gives it back."""
    return json.loads(json.dumps({"layout": how.layout, "options": how.options, "renames": how.renames}))


def _is_kept(kept):
    """Whether this is what save() keeps beside the calibrator."""
    return isinstance(kept, dict) and kept.keys() == set(KEPT) and isinstance(kept["files"], list) and all(
        isinstance(file, dict) and [type(file.get(name)) for name in OF_A_FILE] == [str, int, str]
        for file in kept["files"]
    )


def _differences(then, now):
    """'seed 1, now 2; layout ...' for what differs."""
    before, after = ({**{name: x[name] for name in x if name != "settings"}, **x["settings"]} for x in (then, now))
    return "; ".join(f"{name} {before[name]}, now {after[name]}" for name in after if before.get(name) != after[name])


def _metadata(path):
    existing_file(path)
    with open_safetensors(path) as file:
        return file.metadata() or {}


def _copy_with(source, target, key, text):
    """Copy a safetensors file, with one entry more in its metadata. Tensors are not held in memory."""
    with open(source, "rb") as old, open(target, "wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = dict(sorted({**header["__metadata__"], key: text}.items()))
        encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        encoded = encoded.ljust(-(-len(encoded) // 8) * 8)  # tensors stay aligned
        new.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(old, new, 1 << 24)
