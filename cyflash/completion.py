"""`cyflash completion`: a script that a shell reads once, so that the Tab key completes what `cyflash` takes.

A script takes no time, where asking this program at each press of the key would start Python every time.
"""

import argparse
from pathlib import Path

from cyflash import cli

# Commands, and what they do: shown by --help.
EXAMPLES = {
    "cyflash completion bash > ~/.local/share/bash-completion/completions/cyflash": "bash: in new shells",
    "cyflash completion zsh > ~/.zfunc/_cyflash": "zsh: where ~/.zshrc has fpath+=~/.zfunc before compinit",
    "cyflash completion tcsh | sudo tee /etc/profile.d/cyflash.completion.csh": "tcsh",
}
STATUS: dict[int, str] = {}
SHELLS = ("bash", "zsh", "tcsh")


def add_arguments(parser):
    parser.add_argument("shell", choices=SHELLS, help="the shell; the script goes to stdout (needs shtab)")


def run(args):
    try:
        import shtab
    except ImportError:
        raise ImportError(
            "cyflash completion needs shtab; install it with: pip install 'cyflash-attn[completion]'"
        ) from None
    parser = cli.command_parser(tuple(cli.COMMANDS))
    for action in _actions(parser):
        if _takes_files(action):
            action.complete = shtab.FILE
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser):
    """Of a parser and those of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)


def _takes_files(action):
    return action.type is Path or (action.dest == "json" and action.nargs != 0) or action.metavar == "FILE"
