"""A quick look at an installed genkit, by its public names alone and with pytest only.

The default tests run it in the clone; CI copies this folder elsewhere and runs it against the built wheel.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit as gk


def run(*arguments, cwd=None):
    script = "import sys, genkit.cli; sys.exit(genkit.cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=240, stdin=subprocess.DEVNULL)


def test_the_distribution_is_whole():
    assert gk.__version__ == importlib.metadata.version("genkit-jax")
    assert (Path(gk.__file__).parent / "py.typed").is_file()


def test_draws_have_the_exact_moments():
    mean, cov = jnp.array([1.0, -2.0]), jnp.array([[1.0, 0.6], [0.6, 1.0]])
    grid = gk.diffusion.karras(num_steps=40, sigma_min=0.002, sigma_max=80.0)
    denoiser = gk.diffusion.GaussianDenoiser(mean, cov)
    draws = gk.sample(gk.diffusion.heun(grid), denoiser, 4000, key=jax.random.key(0))
    value = np.asarray(draws.value, np.float64)
    assert value.shape == (4000, 2)
    # 5.1 standard errors: one false alarm in a million over four numbers; 0.01 for the finite grid.
    assert np.all(np.abs(value.mean(axis=0) - mean) < 5.1 / np.sqrt(4000) + 0.01)
    assert np.all(np.abs(value.var(axis=0) - 1.0) < 5.1 * np.sqrt(2 / 4000) + 0.01)


def test_a_model_is_trained_saved_and_loaded(tmp_path):
    done = run("zoo", "copy", "two_moons", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (definition,) = tmp_path.rglob("two_moons.py")
    out = tmp_path / "run"
    done = run("train", definition, "--out", out, "--steps", 20, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    fitted = gk.load(out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(fitted.model) if hasattr(leaf, "dtype"))
    done = run("info", out, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout


def test_the_zoo_is_there():
    done = run("zoo", "list")
    assert done.returncode == 0, done.stderr
    for name in ("digits", "two_moons", "heun_cfg", "dpmpp", "unipc"):
        assert name in done.stdout


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("train", "no_such_file.py", "--out", "run"), ("info", "nowhere")]
)
def test_wrong_input_is_one_clear_line(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()[-1]) > 10
    assert not list(tmp_path.iterdir())


def test_legacy_keys_are_refused():
    denoiser = gk.diffusion.GaussianDenoiser(jnp.zeros(2), jnp.eye(2))
    sampler = gk.diffusion.heun(gk.diffusion.karras(8, 0.01, 10.0))
    with pytest.raises(Exception, match=r"key"):
        gk.sample(sampler, denoiser, 4, key=jax.random.PRNGKey(0))


# One file each of what users add, from public names alone; docs/extending.md shows them.
EXTENDING = Path(__file__).parent / "extending"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of the denoiser of one's own."""
    folder = tmp_path_factory.mktemp("extending")
    done = run("train", EXTENDING / "denoiser.py", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_extension_is_short_and_tried():
    names = {path.stem for path in EXTENDING.glob("*.py")}
    assert names == {"denoiser", *RECIPES, *SAMPLERS, *SCRIPTS}
    assert all(len(path.read_text().splitlines()) <= 40 for path in EXTENDING.glob("*.py"))


RECIPES = ["objective", "schedule"]
SAMPLERS = ["sampler", "guidance", "prediction_transform", "step_transform", "population"]
SCRIPTS = ["divergence", "strategy", "guide_family"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_ones_own_train(name, tmp_path):
    done = run("train", EXTENDING / f"{name}.py", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("20 steps done"), done.stderr


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_of_ones_own_draw(name, trained):
    sampler = EXTENDING / f"{name}.py"
    done = run("sample", "run", "--sampler", sampler, "-n", 64, "--cond", 1, "--out", name, cwd=trained)
    assert done.returncode == 0, done.stderr
    mean = np.load(trained / name / "draws.npz")["value"].mean(axis=0)
    # The second normal has mean 2; guidance and selection push further, and no draw may end among the first.
    assert np.all(mean > 1.4) and np.all(mean < 6.0)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_ones_own_hold_what_they_assert(name, tmp_path):
    command = [sys.executable, str(EXTENDING / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
