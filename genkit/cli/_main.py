"""Running a command, and how it fails: one line on standard error."""

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from genkit.cli._parser import parse
from genkit.cli._signals import Stop, listen
from genkit.cli._text import printable


# Names of Python arguments in the library's messages, and the options that set them.
_OPTIONS = {
    "train": {
        "run": "--out",
        "resume": "--resume",
        "num_steps": "--steps",
        "key": "--seed",
        "mesh": "--devices",
        "recipe": "FILE",
    },
    "sample": {
        "run": "RUN",
        "out": "--out",
        "num_samples": "--num-samples",
        "cond": "--cond",
        "key": "--seed",
        "batch_size": "--batch-size",
        "shape": "--shape",
        "denoiser": "RUN",
        "trust_edited": "--trust-edited",
    },
    "infer": {"problem": "FILE", "method": "--sampler", "key": "--seed", "out": "--out"},
    "demo": {"run": "--out", "num_steps": "--steps", "key": "--seed"},
}
_BROKEN_PIPE = 141  # 128 and the number of SIGPIPE, as shells have it


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        The exit status: 0, or 2 for wrong input and for work that could not be done, 1 for an error nobody expected,
        130 when interrupted, 143 when terminated.

    Example:
        >>> from genkit.cli import main
        >>> main(["zoo", "list"])  # doctest: +ELLIPSIS
        models/...
        0
    """
    try:
        args = parse(argv)
        if args is None:
            return 0
        with listen(args.command) as stop, warnings.catch_warnings():
            warnings.showwarning = _warn(args.command)
            status = _run(args, stop)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough. Python would flush once more at exit, and complain.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return _BROKEN_PIPE


def _run(args: argparse.Namespace, stop: Stop) -> int:
    try:
        return _dispatch(args, stop)
    except BrokenPipeError:
        raise
    except KeyboardInterrupt as error:
        if args.debug:
            traceback.print_exc()
        return _fail(args, str(error) or "interrupted", stop.status)
    except (ValueError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        return _fail(args, _message(error), 2)
    except Exception as error:
        if stop.requests:
            # Some extension modules turn an interrupt while they are imported into an error of their own.
            return _fail(args, "interrupted", stop.status)
        if args.debug:
            traceback.print_exc()
            return 1
        first = str(error).strip().partition("\n")[0]
        return _fail(args, f"{type(error).__name__}: {first} (--debug shows where)", 1)


def _message(error: Exception) -> str:
    # Errors of the system carry a number that helps nobody; our own have their text only.
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    if not error.filename:
        return error.strerror
    return f"`{error.filename}`: {error.strerror}"


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    text = _with_options(args.command, " ".join(message.split()))
    sys.stderr.write(f"genkit {args.command}: {printable(text)}\n")
    return status


def _with_options(command: str, message: str) -> str:
    """The message with options in place of Python's argument names, where it speaks of arguments."""
    names = _OPTIONS.get(command, {})

    def option(match: re.Match[str]) -> str:
        return match[1] + names.get(match[2], f"`{match[2]}`")

    # At the beginning ("`run` must be ...") and in advice ("Pass `resume` to ..."); elsewhere quotes hold values.
    return re.sub(r"(^|Pass )`(\w+)`", option, message)


def _warn(command: str):
    """Function that shows a warning in one line, without the place in the library's code."""

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: object, **more: object) -> None:
        text = _with_options(command, " ".join(str(message).split()))
        sys.stderr.write(f"genkit {command}: warning: {printable(text)}\n")

    return show


def _dispatch(args: argparse.Namespace, stop: Stop) -> int:
    """Import what the command needs, and nothing else, and run it."""
    # JAX takes a second to import, which `info` and `zoo` need not pay.
    if args.command == "demo":
        from genkit.cli import _demo

        return _demo.run(args)
    if args.command == "train":
        from genkit.cli import _train

        return _train.run(args, stop)
    if args.command == "sample":
        from genkit.cli import _sample

        return _sample.run(args)
    if args.command == "infer":
        from genkit.cli import _infer

        return _infer.run(args)
    if args.command == "info":
        from genkit.cli import _info

        return _info.run(args)
    from genkit.cli import _zoo

    return _zoo.run(args)
