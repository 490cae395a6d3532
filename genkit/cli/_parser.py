"""Commands and options of the command line."""

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line and name the nearest word for a typo."""

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong and end the process with status 2."""
        unknown = re.search(r"invalid choice: '([^']*)'", message)
        if unknown:
            message = f"invalid choice: {unknown[1]!r}{_nearest(unknown[1], self.words())}"
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` shows the options)\n")

    def words(self) -> list[str]:
        """Names of the commands below this parser."""
        # argparse has no public way to ask a parser for its commands.
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return list(action.choices)
        return []

    def options(self) -> list[str]:
        """Long options of this parser, in their order."""
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]

    def below(self, command: str) -> "Parser":
        """Parser of one command."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices[command]
        raise KeyError(command)


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    if not near:
        return f"; there are {', '.join(words)}"
    return f"; did you mean {near[0]}?"


def _nearest_option(words: Sequence[str], options: Sequence[str]) -> str:
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], options, n=1)
        if word.startswith("--") and near:
            return f"; did you mean {near[0]}?"
    return ""


def parse(argv: Sequence[str] | None) -> argparse.Namespace | None:
    """Parse a command line.

    Args:
        argv: the arguments; default those of the process.

    Returns:
        The arguments, or None where there are none and the help was shown.
    """
    if argv is None:
        argv = sys.argv[1:]
    parser = _build()
    args, extra = parser.parse_known_args(list(argv))
    asked = parser
    if args.command is not None:
        asked = parser.below(args.command)
    if extra:
        asked.error(f"unrecognized arguments: {' '.join(extra)}{_nearest_option(extra, asked.options())}")
    if args.command is None:
        parser.print_help()
        return None
    return args


class _Version(argparse.Action):
    """Print the version, which is looked up only here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[str] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        # Reading the metadata of the installation takes as long as all the rest of the start.
        from genkit import __version__

        print(f"genkit {__version__}")
        parser.exit()


def _build() -> Parser:
    parser = Parser(
        prog="genkit",
        description="Generative and probabilistic modeling: train, sample, infer from definition files.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    # Not required: `genkit` alone shows the help instead of an error.
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in (_add_demo, _add_train, _add_sample, _add_infer, _add_info, _add_zoo):
        add(commands)
    return parser


def _command(commands: "argparse._SubParsersAction[Parser]", name: str, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-edited", action="store_true", help="run a run's definition file although it was edited since"
    )


def _add_demo(commands: "argparse._SubParsersAction[Parser]") -> None:
    demo = _command(commands, "demo", "train on real digits, draw with guidance, judge, save pictures and figures")
    demo.add_argument("--out", default="runs/demo", metavar="DIR", help="where everything goes (default: %(default)s)")
    demo.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    demo.add_argument("--steps", type=_count, metavar="N", help="training steps (default: as the recipe says)")


def _add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
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


def _add_sample(commands: "argparse._SubParsersAction[Parser]") -> None:
    sample = _command(commands, "sample", "draw from a trained model")
    sample.add_argument("run", metavar="RUN", help="run folder; its definition file is run")
    sample.add_argument("--sampler", required=True, metavar="FILE", help="definition file that binds `sampler`")
    sample.add_argument("-n", "--num-samples", type=_count, required=True, metavar="N", help="how many draws")
    sample.add_argument("--cond", type=_numbers, metavar="C", help="condition: a number, or N of them joined by commas")
    sample.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    sample.add_argument("--out", metavar="DIR", help="where the draws go (default: RUN/draws)")
    sample.add_argument("--batch-size", type=_count, metavar="B", help="draws at a time (default: all)")
    sample.add_argument("--shape", type=_shape, metavar="D,D", help="shape of a draw, where the model does not tell")
    _add_trust(sample)


def _add_infer(commands: "argparse._SubParsersAction[Parser]") -> None:
    infer = _command(commands, "infer", "condition the problem of a definition file on its data")
    infer.add_argument("file", metavar="FILE", help="definition file that binds `problem`; it is run")
    infer.add_argument("--sampler", required=True, metavar="FILE", help="definition file that binds a method")
    infer.add_argument("--seed", type=_seed, default=0, metavar="S", help="default: %(default)s")
    infer.add_argument("--out", metavar="DIR", help="where samples and summary go (default: the summary is printed)")


def _add_info(commands: "argparse._SubParsersAction[Parser]") -> None:
    info = _command(commands, "info", "tell what a file or run folder holds, and whether it is sound; runs nothing")
    info.add_argument("path", metavar="PATH", help="run folder, array file, draws (.npz) or definition file")


def _add_zoo(commands: "argparse._SubParsersAction[Parser]") -> None:
    zoo = _command(commands, "zoo", "the model and sampler files that come with genkit")
    actions = zoo.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list them", allow_abbrev=False)
    copying = actions.add_parser("copy", help="copy one, to read and change", allow_abbrev=False)
    copying.add_argument("name", metavar="NAME", help="as in the list, with or without folder and .py")
    copying.add_argument("--out", default=".", metavar="DIR", help="folder to copy it to (default: the current one)")
    # The default of the outer parser stands; a second default would overwrite an option given before the action.
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
    # JAX makes a key of the lowest 32 bits: a larger seed would be another one's twin.
    if value >= 2**32:
        raise argparse.ArgumentTypeError(f"must be an integer < 2**32; got {text!r}")
    return value


def _need(text: str) -> tuple[str, str]:
    name, equals, run = text.partition("=")
    if not (name.isidentifier() and equals and run):
        raise argparse.ArgumentTypeError(f"must read NAME=RUN; got {text!r}")
    return name, run


def _numbers(text: str) -> list[float] | list[int]:
    # Integers first: a model takes labels as integers and scalars as floats.
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
