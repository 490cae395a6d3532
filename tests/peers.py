"""Other libraries, where they are installed, for benchmarks that compare with them."""

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest


def k_diffusion_sampling() -> ModuleType:
    """The samplers of k-diffusion; skips the test where it is not installed.

    Its package imports everything one trains with. Where that is missing, the samplers are imported without it: they
    need one small function of it.
    """
    pytest.importorskip("torch")
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed")
    try:
        return importlib.import_module("k_diffusion.sampling")
    except ImportError:
        package, utils = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
        package.__path__ = list(found.submodule_search_locations or ())
        utils.append_dims = lambda x, rank: x[(...,) + (None,) * (rank - x.ndim)]
        package.utils = utils
        sys.modules |= {"k_diffusion": package, "k_diffusion.utils": utils}
        return importlib.import_module("k_diffusion.sampling")
