"""An executable that is Python on another CPU: sys.executable of what it runs is that executable again."""
import os
import platform
import shutil
import sys
from pathlib import Path

from emulated import aarch64
from emulated.models import MODELS


def why_not(cpu):
    """What is missing to run Python on this CPU; an empty string where nothing is."""
    machine = MODELS[cpu].machine
    if shutil.which(f"qemu-{machine}") is None:
        return f"qemu-{machine} is not installed (on Debian and Ubuntu: apt-get install qemu-user)"
    if machine == "aarch64":
        return aarch64.why_not()
    return "" if platform.machine() == machine else f"emulating {machine} takes the Python of such a machine"


def interpreter(cpu, folder):
    """The path of Python on this CPU, made in `folder`."""
    machine = MODELS[cpu].machine
    path = Path(folder) / cpu / "bin" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    if machine == "aarch64":
        lines = [f"export {name}='{value}'" for name, value in aarch64.environment().items()]
        command = f"-L '{aarch64.ROOT}' '{aarch64.python()}'"
    else:
        lines, command = [], f"'{os.path.realpath(sys.executable)}'"
        _like_this_environment(path.parents[1])
    model = f"{cpu}{MODELS[cpu].options}"
    # the name in argv[0] is what Python takes for sys.executable, and where it looks for its packages
    lines.append(f'exec qemu-{machine} -cpu {model} -0 "$0" {command} "$@"')
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


def _like_this_environment(folder):
    """Makes a virtual environment of `folder` that has the packages of this one."""
    own = "false" if sys.prefix != sys.base_prefix else "true"
    home = os.path.dirname(os.path.realpath(sys.executable))
    (folder / "pyvenv.cfg").write_text(f"home = {home}\ninclude-system-site-packages = {own}\n")
    if own == "false" and not (folder / "lib").exists():
        (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
