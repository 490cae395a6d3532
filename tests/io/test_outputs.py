"""Draws and pictures: readable elsewhere, written whole, nothing global touched."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import genkit as gk
from genkit.io import load_draws, plot_draws, plot_grid, plot_log, save_draws


def test_draws_return(tmp_path):
    draws = gk.Draws(
        jnp.arange(6.0).reshape(3, 2), jnp.full(3, 7), jnp.full(3, 5), {"active": jnp.ones((3, 4), bool), "none": None}
    )
    gk.save(tmp_path / "draws.npz", draws)
    arrays = load_draws(tmp_path / "draws.npz")
    assert set(arrays) == {"value", "nfe", "nfe_logical", "info.active"}
    assert arrays["value"].tolist() == [[0, 1], [2, 3], [4, 5]] and arrays["info.active"].shape == (3, 4)


def test_keys_and_half_precision_become_what_numpy_knows(tmp_path):
    save_draws(tmp_path / "d.npz", {"key": jax.random.key(3), "half": jnp.ones(2, jnp.bfloat16), "chains": [1.5]})
    arrays = load_draws(tmp_path / "d.npz")
    assert arrays["key"].tolist() == [0, 3] and arrays["half"].dtype == np.float32 and arrays["chains.0"] == 1.5


def test_damaged_draws_are_refused(tmp_path):
    save_draws(tmp_path / "d.npz", {"x": np.random.default_rng(0).normal(size=1000)})
    content = (tmp_path / "d.npz").read_bytes()
    np.savez(tmp_path / "object.npz", x=np.array([{}], dtype=object))
    damaged = [content[:100], content[:-30], b"", b"PK", bytes(50), (tmp_path / "object.npz").read_bytes()]
    damaged.append(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    for content in damaged:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(gk.CorruptFileError, match=r"bad.npz` cannot be read: it is not a sound .npz"):
            load_draws(tmp_path / "bad.npz")
    with pytest.raises(FileNotFoundError, match=r"no file at .*gone"):
        load_draws(tmp_path / "gone.npz")


def test_a_grid_shows_each_pixel_where_it_belongs(tmp_path):
    images = -np.ones((5, 1, 2, 3))
    images[4, 0, 1, 2] = 1.0
    images[0, 0, 0, 0] = 9.0  # clipped
    plot_grid(tmp_path / "grid.png", images, columns=3, scale=4)
    picture = matplotlib.image.imread(tmp_path / "grid.png")[..., :3]
    gap = 2
    assert picture.shape == (2 * (2 * 4 + gap) + gap, 3 * (3 * 4 + gap) + gap, 3)
    white = np.argwhere((picture == 1).all(-1))
    first, last = white[:16], white[16:]
    assert len(white) == 32
    assert first.min(0).tolist() == [gap, gap] and first.max(0).tolist() == [gap + 3, gap + 3]
    top, left = gap + 10 + 4, gap + 14 + 8
    assert last.min(0).tolist() == [top, left] and last.max(0).tolist() == [top + 3, left + 3]


def test_colors_and_plain_images(tmp_path):
    images = np.zeros((1, 3, 2, 2))
    images[0, 0] = 1.0
    plot_grid(tmp_path / "c.png", images, scale=1, limits=(0.0, 1.0))
    assert matplotlib.image.imread(tmp_path / "c.png")[1, 1, :3].tolist() == [1, 0, 0]
    plot_grid(tmp_path / "g.png", np.zeros((7, 4, 4)))
    assert (tmp_path / "g.png").stat().st_size > 0


def test_grids_refuse_what_is_no_image(tmp_path):
    for shape in ((3,), (2, 5, 4, 4), (0, 1, 4, 4)):
        with pytest.raises(ValueError, match="`images` must be of shape"):
            plot_grid(tmp_path / "no.png", np.zeros(shape))
    with pytest.raises(gk.NonFiniteError, match="`images` must be finite"):
        plot_grid(tmp_path / "no.png", np.full((1, 2, 2), np.nan))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "pictured"),
    [((9, 1, 8, 8), True), ((9, 3, 8, 8), True), ((9, 2), True), ((9, 1), True), ((9,), True), ((9, 5), False)],
)
def test_the_picture_suits_the_draws(tmp_path, shape, pictured):
    assert plot_draws(tmp_path / "d.png", np.random.default_rng(0).normal(size=shape)) is pictured
    assert (tmp_path / "d.png").exists() is pictured


def test_logs_are_plotted(tmp_path):
    plot_log(tmp_path / "log.png", {"loss": np.linspace(1, 0, 200), "short": np.ones(1)})
    assert matplotlib.image.imread(tmp_path / "log.png").std() > 0.01
    with pytest.raises(ValueError, match="`log` must be a dict with at least one metric"):
        plot_log(tmp_path / "no.png", {})


GLOBAL = """
import sys
import numpy as np
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 7.0
# Asking for the backend would choose one, and import pyplot.
state = lambda: {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}
before = state()
from genkit.io import plot_draws, plot_log
plot_draws(sys.argv[1] + "/a.png", np.zeros((3, 2)))
plot_draws(sys.argv[1] + "/b.png", np.zeros((3, 1, 4, 4)))
plot_log(sys.argv[1] + "/c.png", {"loss": np.ones(5)})
assert state() == before
assert "matplotlib.pyplot" not in sys.modules
"""


def test_no_global_state_is_touched(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", GLOBAL, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("genkit.storage._files.os.fsync", full)
    for write in (
        lambda: plot_grid(path, np.zeros((1, 4, 4))),
        lambda: plot_log(path, {"loss": np.ones(3)}),
        lambda: save_draws(path, {"x": np.ones(3)}),
    ):
        with pytest.raises(gk.SaveError, match="No space left on device; the file that was there is intact"):
            write()
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_archives_come_back_as_what_was_saved(tmp_path):
    """Without `like`: types, dtypes, nesting and what was None."""
    draws = gk.Draws(jnp.arange(6.0).reshape(3, 2), jnp.full(3, 7), jnp.full(3, 5), {"scale": jnp.ones((3, 4), bool)})
    gk.save(tmp_path / "draws.npz", draws)
    loaded = gk.load(tmp_path / "draws.npz")
    assert isinstance(loaded, gk.Draws) and jax.tree.structure(loaded) == jax.tree.structure(draws)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(draws), strict=True))
    tree = {
        "a": {"b.c": np.arange(3), "none": None},
        "half": jnp.ones(2, jnp.bfloat16),
        "n": 3,
        "key": jax.random.key(1),
    }
    gk.save(tmp_path / "tree.npz", tree)
    loaded = gk.load(tmp_path / "tree.npz")
    assert loaded["a"]["b.c"].tolist() == [0, 1, 2] and loaded["a"]["none"] is None and loaded["n"] == 3
    assert loaded["half"].dtype == jnp.bfloat16 and loaded["key"].dtype == tree["key"].dtype
    np.savez(tmp_path / "foreign.npz", x=np.ones(2))
    assert gk.load(tmp_path / "foreign.npz")["x"].tolist() == [1, 1]
