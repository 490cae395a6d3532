"""`genkit zoo`: the model and sampler files that come with genkit."""

import ast
import shutil
from argparse import Namespace
from pathlib import Path

from .._core._checks import check_choice


_FOLDERS = ("models", "samplers")


def run(args: Namespace) -> int:
    """List the zoo, or copy a file out of it.

    Args:
        args: the parsed command line.

    Returns:
        Exit status 0.
    """
    files = _files()
    if args.action == "list":
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(f"{name:<{width}}  {_first_line(path)}")
        return 0
    source = zoo_file(args.name)
    target = Path(args.out) / source.name
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder at `{target.parent}`.")
    if target.exists():
        raise FileExistsError(f"`{target}` exists; it is left as it is.")
    shutil.copyfile(source, target)
    print(target)
    return 0


def zoo_file(name: str) -> Path:
    """The path of a file of the zoo.

    Args:
        name: such as `models/digits.py`; folder and suffix may be left out.

    Returns:
        Where the file stands.

    Raises:
        ValueError: if there is no such file, proposing the nearest.
    """
    files = _files()
    short = {Path(full).stem: full for full in files} | {full.removesuffix(".py"): full for full in files}
    if name in files:
        return files[name]
    if name.removesuffix(".py") not in short:
        check_choice("name", name, sorted({Path(full).stem for full in files}))
    return files[short[name.removesuffix(".py")]]


def _files() -> dict[str, Path]:
    """The files by name: inside an installed wheel, beside the package in a clone."""
    package = Path(__file__).parents[1]
    root = package / "_zoo" if (package / "_zoo").is_dir() else package.parent
    found = {f"{folder}/{path.name}": path for folder in _FOLDERS for path in sorted((root / folder).glob("*.py"))}
    if not found:
        raise FileNotFoundError("this installation has no zoo: neither `genkit/_zoo` nor folders beside the package.")
    return found


def _first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_bytes())) or ""
    return doc.partition("\n")[0]
