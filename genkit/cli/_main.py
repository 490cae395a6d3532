"""What the commands take, and how they fail: one line on standard error."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__


class _Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` shows the options)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        The exit status: 0, or 2 for wrong input and for work that could not be done, 1 for an error nobody expected,
        130 when interrupted.

    Example:
        >>> from genkit.cli import main
        >>> main(["zoo", "list"])  # doctest: +ELLIPSIS
        models/...
        0
    """
    args = _parser().parse_args(argv)
    try:
        return _dispatch(args)
    except KeyboardInterrupt as error:
        if args.debug:
            traceback.print_exc()
        return _fail(args, str(error) or "interrupted", 130)
    except (ValueError, OSError) as error:
        if args.debug:
            traceback.print_exc()
        return _fail(args, _message(error), 2)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
            return 1
        first = str(error).strip().partition("\n")[0]
        return _fail(args, f"{type(error).__name__}: {first} (--debug shows where)", 1)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"`{error.filename}`: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    sys.stderr.write(f"genkit {args.command}: {' '.join(message.split())}\n")
    return status


def _dispatch(args: argparse.Namespace) -> int:
    """Import what the command needs, and nothing else, and run it."""
    if args.command == "demo":
        from . import _demo as command
    elif args.command == "train":
        from . import _train as command
    elif args.command == "sample":
        from . import _sample as command
    elif args.command == "infer":
        from . import _infer as command
    elif args.command == "info":
        from . import _info as command
    else:
        from . import _zoo as command
    return command.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="genkit", description="Generative and probabilistic models on JAX.")
    parser.add_argument("--version", action="version", version=f"genkit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_add_demo, _add_train, _add_sample, _add_infer, _add_info, _add_zoo):
        add(commands)
    return parser


def _command(commands: "argparse._SubParsersAction[_Parser]", name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_demo(commands: "argparse._SubParsersAction[_Parser]") -> None:
    demo = _command(commands, "demo", "train on real digits, draw with guidance, judge, save pictures and figures")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    demo.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    demo.add_argument("--steps", type=_count, metavar="N", help="training steps (default: as the recipe says)")


def _add_train(commands: "argparse._SubParsersAction[_Parser]") -> None:
    train = _command(commands, "train", "train the recipe of a definition file")
    train.add_argument("file", metavar="FILE", help="definition file that binds `recipe`; it is run")
    train.add_argument("--out", required=True, metavar="RUN", help="run folder to write")
    train.add_argument("--steps", type=_count, metavar="N", help="steps in all (default: as the recipe says)")
    train.add_argument("--resume", action="store_true", help="continue the run in RUN, if there is one")
    train.add_argument("--seed", type=_seed, metavar="S", help="default: 0, or that of the resumed run")
    train.add_argument(
        "--with",
        dest="needs",
        type=_need,
        action="append",
        default=[],
        metavar="NAME=RUN",
        help="a run for each model that the recipe's `needs` names",
    )
    train.add_argument("--devices", type=_count, metavar="N", help="spread the batch over N devices (default: 1)")
    train.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, when there are several")
    train.add_argument("--num-processes", type=_count, metavar="N", help="how many processes there are")
    train.add_argument("--process-id", type=_seed, metavar="I", help="which of them this is, from 0")


def _add_sample(commands: "argparse._SubParsersAction[_Parser]") -> None:
    sample = _command(commands, "sample", "draw from a trained model")
    sample.add_argument("run", metavar="RUN", help="run folder; its definition file is run")
    sample.add_argument("--sampler", required=True, metavar="FILE", help="definition file that binds `sampler`")
    sample.add_argument("-n", "--num-samples", type=_count, required=True, metavar="N", help="how many draws")
    sample.add_argument("--cond", type=_numbers, metavar="C", help="condition: a number, or N of them joined by commas")
    sample.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    sample.add_argument("--out", metavar="DIR", help="where the draws go (default: RUN/draws)")
    sample.add_argument("--batch-size", type=_count, metavar="B", help="draws at a time (default: all)")
    sample.add_argument("--shape", type=_shape, metavar="D,D", help="shape of a draw, where the model does not tell")


def _add_infer(commands: "argparse._SubParsersAction[_Parser]") -> None:
    infer = _command(commands, "infer", "condition the problem of a definition file on its data")
    infer.add_argument("file", metavar="FILE", help="definition file that binds `problem`; it is run")
    infer.add_argument("--sampler", required=True, metavar="FILE", help="definition file that binds a method")
    infer.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    infer.add_argument("--out", metavar="DIR", help="where samples and summary go (default: the summary is printed)")


def _add_info(commands: "argparse._SubParsersAction[_Parser]") -> None:
    info = _command(commands, "info", "tell what a file or run folder holds, and whether it is sound; runs nothing")
    info.add_argument("path", metavar="PATH", help="run folder, array file, draws (.npz) or definition file")


def _add_zoo(commands: "argparse._SubParsersAction[_Parser]") -> None:
    zoo = _command(commands, "zoo", "the model and sampler files that come with genkit")
    actions = zoo.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list them", allow_abbrev=False)
    copying = actions.add_parser("copy", help="copy one, to read and change", allow_abbrev=False)
    copying.add_argument("name", metavar="NAME", help="as in the list, with or without folder and .py")
    copying.add_argument("--out", default=".", metavar="DIR", help="folder to copy it to (default: the current one)")
    for parser in (listing, copying):
        parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _integer(text: str, minimum: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = minimum - 1
    if value < minimum:
        raise argparse.ArgumentTypeError(f"must be an integer >= {minimum}; got {text!r}")
    return value


def _count(text: str) -> int:
    return _integer(text, 1)


def _seed(text: str) -> int:
    value = _integer(text, 0)
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer < 2**32; got {text!r}")
    return value


def _need(text: str) -> tuple[str, str]:
    name, equals, run = text.partition("=")
    if not (name.isidentifier() and equals and run):
        raise argparse.ArgumentTypeError(f"must read NAME=RUN; got {text!r}")
    return name, run


def _numbers(text: str) -> list[float] | list[int]:
    parts = text.split(",")
    try:
        return [int(part) for part in parts]
    except ValueError:
        pass
    try:
        return [float(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers joined by commas; got {text!r}") from None


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_integer(part, 1) for part in text.split(","))
