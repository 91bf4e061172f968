"""Compiled kernels on disk, so that a variant is compiled once on a machine and not once in every process.

A file is called <key>-<digest>.cubin. The key stands for everything that the machine code depends on, the digest for
the code itself: a file that was cut short or changed is not used, and one that is there is complete.
"""
import contextlib
import hashlib
import os
import tempfile
from pathlib import Path

from cyflash.gpu import build, status

VARIABLE = "CYFLASH_CACHE_DIR"
DIGEST = 16  # hexadecimal digits of the digest in a name


def folder():
    """Where compiled kernels are kept: CYFLASH_CACHE_DIR, or ~/.cache/cyflash."""
    given = os.environ.get(VARIABLE)
    try:
        return Path(given).expanduser() if given else Path.home() / ".cache" / "cyflash"
    except RuntimeError as error:  # a user without a home, as containers have
        raise RuntimeError(
            f"compiled kernels cannot be kept: {error}; set {VARIABLE} to a folder that can be written"
        ) from error


def key(texts, options, version):
    """Of a kernel: its sources {file name: text}, the compiler's options (the architecture among them), its version."""
    digest = hashlib.sha256()
    parts = [repr(version), *options, *(part for item in texts.items() for part in item)]
    for part in parts:  # each with its length: no two lists of parts run together to the same text
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def path_of(variant):
    """The file with a variant's machine code, which is compiled where there is none.

    Returns
    -------
    Path

    Raises
    ------
    KernelCompileError, GPUUnavailableError
        As `build.build`.
    OSError
        Where the folder cannot be written; the message says which variable names another one.
    """
    texts = build.sources(variant)
    name = key(texts, build.options(variant), status.nvrtc()[1])
    return _found(name) or _kept(name, build.build(variant, texts).cubin)


def _found(name):
    """The file of this key whose content is what its name says, or None."""
    for path in sorted(folder().glob(f"{name}-*.cubin")):
        with contextlib.suppress(OSError):  # cannot be read: whether another one can be written is seen next
            if path.name == _file_name(name, path.read_bytes()):
                return path
    return None


def _kept(name, cubin):
    """Write a file that appears whole or not at all, whoever else writes it at the same time."""
    where = folder()
    path = where / _file_name(name, cubin)
    try:
        where.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=where, prefix=f"{name[:8]}-", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(cubin)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise type(error)(
            error.errno, f"compiled kernels cannot be kept in {where} ({error.strerror}); set {VARIABLE} to a folder "
            "that can be written"
        ) from error
    return path


def _file_name(name, cubin):
    return f"{name}-{hashlib.sha256(cubin).hexdigest()[:DIGEST]}.cubin"
