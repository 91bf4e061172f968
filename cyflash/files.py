"""Files that appear only when they are complete; files of others: what is no file, and JSON that is none; .safetensors
files that say who wrote them."""
import json
import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
    """A path beside `path` to write to; it becomes `path` at the end of the block, or is removed on an error."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user wants files: a library may make its own more private
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def safetensors_path(path):
    """`path` as a Path, or ValueError for another suffix."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path}: expected a file that ends in .safetensors")
    return path


def existing_file(path):
    """`path` as a Path, or FileNotFoundError: also for a pipe or a device, which would be waited for."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'expected a file' if os.path.lexists(path) else 'no such file'}")
    return path


def parsed_json(text):
    """json.loads, with ValueError for all that it does not take: nested too deeply, a name twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs):
    found = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        found[name] = value
    return found


@contextmanager
def open_safetensors(path):
    """The file at `path`, open to read; ValueError where it is none."""
    import safetensors

    try:
        with safetensors.safe_open(path, "numpy") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable .safetensors file: {error}") from None


def read_safetensors(path, file_format, writer):
    """(metadata, {name: array}) of a file whose metadata say that it has `file_format`; writer: what errors call it."""
    path = existing_file(safetensors_path(path))
    with open_safetensors(path) as file:
        metadata, names = file.metadata() or {}, list(file.keys())
        if metadata.get("format") != file_format:
            raise ValueError(f"{path}: expected a file that {writer} wrote, got one with {sorted(names)}")
        return metadata, {name: tensor_of(file, path, name) for name in names}


def tensor_of(file, path, name):
    """An array of an open .safetensors file; ValueError where NumPy has no such dtype, or not so many axes."""
    try:
        return file.get_tensor(name)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {name}: cannot be read as an array: {error}") from None


def write_safetensors(path, tensors, metadata):
    """Write {name: C-contiguous array} and {key: text} to `path`: the same contents, in any order, as the same bytes.

    The library orders tensors, but its metadata come in an order that changes from call to call.
    """
    import safetensors.numpy

    with replacing(path) as temporary:
        try:
            safetensors.numpy.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from None
        with open(temporary, "r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(metadata.items()))
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            assert len(text) <= size  # the same entries in another order
            file.seek(8)
            file.write(text.ljust(size))
