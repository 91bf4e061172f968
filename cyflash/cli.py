"""The command line: `cyflash compare`, `calibrate`, `check`, ...; one module each, imported when asked for."""

import argparse
import contextlib
import importlib
import os
import shutil
import sys
import textwrap
import traceback

# name -> what it does. Each is a module of this package with add_arguments(parser), run(args) -> exit status, and what
# --help shows: EXAMPLES {command: what it does} and STATUS {exit status: when}, beside those that all have.
COMMANDS = {
    "compare": "error, time and memory of int8 and fp32 beside plain NumPy attention, on captured activations",
    "calibrate": "static int8 scales from captured activations, chosen for the error of the attention's output",
    "check": "whether static scales keep the error of the output within limits, for scripts: exit status 0 or 1",
    "report": "one HTML page of what calibrated scales do to each head, where the error comes from, what would help",
    "bench": "speed beside NumPy, torch, onnxruntime and openvino, in fp32 and int8",
    "info": "what was built, what runs here, and on how many threads",
    "completion": "a script with which a shell completes commands, options and files",
}
EXAMPLES = {
    "cyflash compare": "the main job, on the activations of a real model that ship with the project",
    "cyflash COMMAND --help": "options, examples and exit statuses of a command",
    "cyflash --traceback COMMAND ...": "where an error comes from",
}
STATUS = {0: "done", 2: "an error, which stderr says in one line", 130: "interrupted by Ctrl-C"}
# What a user can cause: said in one line, without a traceback.
ERRORS = (OSError, ValueError, TypeError, NotImplementedError, RuntimeError, MemoryError, ImportError)


def main(argv=None):
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        Arguments; by default those of the process.

    Returns
    -------
    int
        Exit status: 0, 1 if a comparison or check failed or a file was left out, 2 for an error of use, 130 when
        interrupted.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    argv = sys.argv[1:] if argv is None else argv
    args = command_parser(argv).parse_args(argv)
    try:
        with _json_alone(args):
            status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("cyflash: interrupted", file=sys.stderr)
        return 130
    except ERRORS as error:
        if args.traceback:
            traceback.print_exc()
            return 2
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"cyflash {args.command}: error: {message}", file=sys.stderr)
        return 2


def _json_alone(args):
    """With `--json -` all else that goes to stdout goes to stderr."""
    from cyflash.output import Stdout

    alone = isinstance(getattr(args, "json", None), Stdout)
    return contextlib.redirect_stdout(sys.stderr) if alone else contextlib.nullcontext()


def command_parser(names):
    """The argparse parser, complete for the commands among names: only these are imported, so that `cyflash info` stays
    fast."""
    parser = _Parser(prog="cyflash", description="FlashAttention for NumPy arrays on the CPU.")
    parser.epilog = _epilog(EXAMPLES, STATUS)
    parser.add_argument("--version", action=_Version, help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in names:
            module = importlib.import_module(f"cyflash.{name}")
            module.add_arguments(command)
            command.epilog = _epilog(module.EXAMPLES, dict(sorted({**STATUS, **module.STATUS}.items())))
            command.set_defaults(run=module.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """Errors in one line; examples as they are written. Subcommands get parsers of this class as well."""

    def __init__(self, **options):
        super().__init__(**options, formatter_class=_HelpFormatter)

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:  # said by the command's own parser, so that the error points to the right --help
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; {self.prog} --help lists the options\n")


class _HelpFormatter(argparse.HelpFormatter):
    """Wraps all but the epilog."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30, width=min(100, shutil.get_terminal_size().columns - 2))

    def _fill_text(self, text, width, indent):
        if text.startswith("examples:"):
            return text
        return super()._fill_text(text, width, indent)


def _epilog(examples, status):
    lines = ["examples:"]
    for command, text in examples.items():
        lines += [f"  {command}", *textwrap.wrap(text, 90, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    lines += ["", "exit status:", *(f"  {number:<4}{text}" for number, text in status.items())]
    return "\n".join(lines).replace("%", "%%")


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        import cyflash

        print(f"cyflash {cyflash.__version__}")
        parser.exit()
