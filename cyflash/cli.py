"""The command line: `cyflash compare`, `calibrate`, `check`, ...; one module each, imported when asked for."""

import argparse
import importlib
import os
import sys

# name -> what it does. Each is a module of this package with add_arguments(parser) and run(args) -> exit status.
COMMANDS = {
    "compare": "error, time and memory of int8 and fp32 beside plain NumPy attention, on captured activations",
    "calibrate": "static int8 scales from captured activations, chosen for the error of the attention's output",
    "check": "whether static scales keep the error of the output within limits, for scripts: exit status 0 or 1",
    "report": "one HTML page of what calibrated scales do to each head, where the error comes from, what would help",
    "bench": "speed beside NumPy, torch, onnxruntime and openvino, in fp32 and int8",
    "info": "what was built, what runs here, and on how many threads",
}
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
    args = _parser(argv).parse_args(argv)
    try:
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
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"cyflash {args.command}: error: {message}", file=sys.stderr)
        return 2


def _parser(argv):
    parser = argparse.ArgumentParser(prog="cyflash", description="FlashAttention for NumPy arrays on the CPU.")
    parser.add_argument("--version", action=_Version, help="print the version")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if name in argv:  # only the command that is asked for is imported: `cyflash info` stays fast
            module = importlib.import_module(f"cyflash.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


class _Version(argparse.Action):
    def __init__(self, option_strings, dest, help):
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        import cyflash

        print(f"cyflash {cyflash.__version__}")
        parser.exit()
