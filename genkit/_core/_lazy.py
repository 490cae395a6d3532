"""Names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping


def attach(
    package: str, homes: Mapping[str, str], submodules: Iterable[str] = ()
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Build the module-level `__getattr__` and `__dir__` of a package whose names are imported on demand.

    Importing JAX takes a second of processor time. A package that defines its names through this function costs
    nothing until one of them is used, which is what keeps `genkit --help` and `genkit info` fast (PEP 562).

    Args:
        package: the package's `__name__`.
        homes: for each name, the module that defines it.
        submodules: names of subpackages, imported as a whole.

    Returns:
        `__getattr__` and `__dir__`, to be bound at the top level of the package.
    """
    submodules = frozenset(submodules)

    def get(name: str) -> object:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name in homes:
            value = getattr(importlib.import_module(homes[name]), name)
            # The next look-up finds the name like any other, without a call.
            setattr(sys.modules[package], name, value)
            return value
        raise AttributeError(_unknown(package, name, names()))

    def names() -> list[str]:
        bound = vars(sys.modules[package])
        classes_and_functions = {
            name for name, value in bound.items() if getattr(value, "__module__", "").startswith("genkit.")
        }
        public = {*homes, *submodules, *classes_and_functions}
        return sorted(name for name in public if not name.startswith("_"))

    return get, names


def _unknown(package: str, name: str, names: list[str]) -> str:
    """Error text for a name that the package lacks, with the nearest one."""
    # Imported here because it is needed only when something is wrong.
    import difflib

    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(names)}"
    return f"module {package!r} has no attribute {name!r}; {hint}"
