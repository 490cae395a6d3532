"""What `import genkit` does, in a process of its own: nothing but define names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
LAZY = ["arviz", "arviz_base", "diffrax", "matplotlib", "sklearn", "tensorflow", "torch"]

SCRIPT = """
import random, socket, sys, warnings
import numpy as np

def refuse(*args, **kwargs):
    raise OSError("the network was touched at import")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import jax, equinox, numpyro, optax

def switches():
    return {name: value for name, value in jax.config.values.items()}

before = switches(), np.random.get_state(), random.getstate(), list(warnings.filters), jax.default_backend
import genkit
names = {name: getattr(genkit, name) for name in dir(genkit)}
after = switches(), np.random.get_state(), random.getstate(), list(warnings.filters), jax.default_backend

assert before[0] == after[0], "jax.config was changed"
assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1])), "NumPy's global generator was moved"
assert before[2:] == after[2:], "a global was changed"
print(*[name for name in LAZY if name in sys.modules])
"""


def run(script: str, *flags: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", *flags, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light_offline_and_without_side_effects():
    assert run(f"LAZY = {LAZY!r}\n{SCRIPT}") == ""


def test_import_starts_no_backend():
    # Making an array at import would pick the device before the user could.
    script = "import genkit, jax; jax.config.update('jax_platforms', 'nowhere'); jax.devices()"
    with pytest.raises(AssertionError, match="nowhere"):
        run(script)


def test_names_are_imported_when_first_used():
    script = """
import sys, genkit
assert "jax" not in sys.modules and "genkit.sde" not in sys.modules and "sde" in dir(genkit)
assert genkit.sde is sys.modules["genkit.sde"]
for name in ("diffusoin", "qqq"):
    try:
        getattr(genkit, name)
    except AttributeError as error:
        print(error)
"""
    near, far = run(script).splitlines()
    assert near == "module 'genkit' has no attribute 'diffusoin'; did you mean `diffusion`?"
    assert far.startswith("module 'genkit' has no attribute 'qqq'; it has ") and "bridge, cli, data" in far


def test_only_public_names_are_shown():
    import genkit

    assert {"fit", "sample", "Denoiser", "vi"} <= set(dir(genkit))
    assert not [name for name in dir(genkit) if name.startswith("_") or name in ("Any", "TYPE_CHECKING", "importlib")]
    for name in dir(genkit):
        assert getattr(genkit, name).__name__.removeprefix("genkit.") == name


def test_the_package_is_typed_and_versioned():
    import importlib.metadata

    import genkit

    assert (Path(genkit.__file__).parent / "py.typed").is_file()
    assert genkit.__version__ == importlib.metadata.version("genkit-jax")
