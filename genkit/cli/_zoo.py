"""`genkit zoo`: the model and sampler files that come with genkit."""

import ast
import difflib
import shutil
from argparse import Namespace
from pathlib import Path


_FOLDERS = ("models", "samplers")


def run(args: Namespace) -> int:
    """List the zoo, or copy a file out of it.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    if args.action == "list":
        files = zoo_files()
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(f"{name:<{width}}  {_first_line(path)}")
        return 0
    source = zoo_file(args.name)
    target = Path(args.out) / source.name
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder at `{target.parent}`.")
    if target.exists():
        # It may hold changes of the user's.
        raise FileExistsError(f"`{target}` exists; it is left as it is.")
    shutil.copyfile(source, target)
    print(target)
    return 0


def zoo_file(name: str) -> Path:
    """Find a file of the zoo.

    Args:
        name: such as `models/digits.py`; folder and suffix may be left out.

    Returns:
        Its path.

    Raises:
        ValueError: if there is no such file, proposing the nearest.
    """
    files = zoo_files()
    wanted = name.removesuffix(".py")
    for full, path in files.items():
        if wanted in (full.removesuffix(".py"), path.stem):
            return path
    near = nearest(wanted)
    hint = "`genkit zoo list` shows what there is."
    if near:
        hint = f"Did you mean {near!r}?"
    raise ValueError(f"the zoo has no {name!r}. {hint}")


def nearest(name: str) -> str | None:
    """Name of the file of the zoo that is spelled most like `name`, or begins with it; None where none is close."""
    stems = [path.stem for path in zoo_files().values()]
    # A missing letter or two first; then a name that was cut off.
    close = difflib.get_close_matches(Path(name).stem, stems, n=1)
    longer = [stem for stem in stems if stem.startswith(Path(name).stem)]
    return next(iter([*close, *longer]), None)


def find_definition(path: str) -> str:
    """Refuse a definition file that does not exist, telling where the zoo has one of that name.

    Args:
        path: as the user typed it.

    Returns:
        The same path.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if Path(path).exists():
        return path
    near = nearest(path)
    # Outside a clone there is no folder `samplers/`: the zoo's files are inside the installation.
    if near is None:
        hint = ""
    elif near == Path(path).stem:
        hint = f"; `genkit zoo copy {near}` puts the one of the zoo here"
    else:
        hint = f"; did you mean {near!r} of the zoo? `genkit zoo copy {near}` puts it here"
    raise FileNotFoundError(f"no definition file at `{path}`{hint}")


def zoo_files() -> dict[str, Path]:
    """The files by name: inside an installed wheel, beside the package in a clone."""
    package = Path(__file__).parents[1]
    root = package / "_zoo"
    if not root.is_dir():
        root = package.parent
    found = {f"{folder}/{path.name}": path for folder in _FOLDERS for path in sorted((root / folder).glob("*.py"))}
    if not found:
        raise FileNotFoundError("this installation has no zoo: neither `genkit/_zoo` nor folders beside the package.")
    return found


def _first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return doc.partition("\n")[0]
