"""The zoo's fractional models and samplers, end to end with a few steps; and the pictures of such models."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest

import genkit as gk
from genkit.io._plots import _processes


ROOT = Path(__file__).parents[2]


def definition(path):
    """The module of a definition file."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trained(module, num_steps=2):
    fitted = gk.fit(module.recipe, key=jax.random.key(0), num_steps=num_steps)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(fitted.model) if hasattr(leaf, "at"))
    return fitted.model


@pytest.mark.slow
@pytest.mark.key_reuse  # the recipe's own batches are drawn from one key in every step of a chunk
def test_bridge_of_the_zoo():
    module = definition("models/fou_bridge.py")
    paths = trained(module).paths(np.array([1.0, 2.0]), 2_000, key=jax.random.key(1))
    assert paths.shape == (2_000, 2, 1)
    # Two steps away from the exact control: its spread is .5282 (standard error 1.6 %).
    assert abs(float(paths[:, 0, 0].std()) / 0.5282 - 1) < 0.1


@pytest.mark.slow
def test_lorenz_of_the_zoo_and_its_sampler():
    module = definition("models/lorenz_latent.py")
    assert module.data.shape == (256, 20, 3)
    np.testing.assert_allclose(module.data.std((0, 1)), 1.0, rtol=0.01)
    model = trained(module)
    sampler = gk.sde.PathSampler(4, steps_per_interval=2)
    draws = gk.sample(sampler, model, 3, key=jax.random.key(2))
    assert draws.value.shape == (3, 4, 3)
    assert int(draws.nfe[0]) == 16
    assert gk.load(ROOT / "samplers/sde_paths.py").num_times == 50


@pytest.mark.slow
def test_video_of_the_zoo():
    module = definition("models/digits_video.py")
    assert module.data.shape[1:] == (10, 12, 12)
    assert float(module.data.min()) >= 0 and float(module.data.max()) <= 1
    model = trained(module)
    frame = model(jnp.zeros(model.sde.dim)).mean
    assert frame.shape == (12, 12)


@pytest.mark.long
@pytest.mark.key_reuse  # the recipe's own batches are drawn from one key in every step of a chunk
def test_lorenz_of_the_zoo_trained():
    """What the file promises, on series of its own: the bound, and the law of the states without observations."""
    module = definition("models/lorenz_latent.py")
    model = trained(module, module.NUM_STEPS)
    fresh = module.series(jax.random.key(77))

    def bound(y, key):
        seen = model.observe(module.ts, y)
        return gk.sde.elbo(model.sde, model.posterior(seen), seen, steps_per_interval=2, num_particles=8, key=key)

    keys = jax.random.split(jax.random.key(6), len(fresh))
    known, held_out = (float(jax.jit(jax.vmap(bound))(y, keys).mean()) for y in (module.data, fresh))
    path = lambda key: gk.sde.simulate(model.sde, module.ts, steps_per_interval=2, key=key).x
    drawn = jax.vmap(path)(keys)
    states = lambda series: np.asarray(series).reshape(-1, 3)[::3]
    normal = np.random.default_rng(1).normal(size=states(fresh).shape)
    far = [gk.divergence.energy_distance(x, states(module.data)) for x in (states(drawn), states(fresh), normal)]
    found = (
        f"bound {known:.1f}, held out {held_out:.1f}; distance of states, of real ones, of normals {np.round(far, 4)}"
    )
    print(found)  # noqa: T201 (shown by -s)
    assert known > 60, found
    assert held_out > 45, found
    assert far[0] < far[2] / 5, found


@pytest.mark.long
@pytest.mark.key_reuse  # as above
def test_video_of_the_zoo_trained():
    """New motions of new digits: frames far better than any still picture's."""
    module = definition("models/digits_video.py")
    model = trained(module, module.NUM_STEPS)
    fresh = module.videos(gk.data.digits().x_test, jax.random.key(9))

    def read(y, key):
        seen = model.observe(module.ts, y)
        guide = model.posterior(seen)
        x = gk.sde.simulate(model.sde, module.ts, guide=guide, key=key).x
        bound = gk.sde.elbo(model.sde, guide, seen, num_particles=8, key=key)
        return bound, ((jax.vmap(lambda x: model(x).mean)(x) - y) ** 2).mean()

    bound, error = (
        float(v.mean()) for v in jax.jit(jax.vmap(read))(fresh, jax.random.split(jax.random.key(6), len(fresh)))
    )
    still = float(((fresh - fresh.mean(1, keepdims=True)) ** 2).mean())
    found = f"bound {bound:.0f}, squared error {error:.4f}, best still picture {still:.4f}"
    print(found)  # noqa: T201 (shown by -s)
    assert bound > 1300, found
    assert error < still / 3, found


@pytest.mark.slow
def test_nile_of_the_zoo_under_its_sampler():
    module = definition("models/nile.py")
    sampler = gk.load(ROOT / "samplers/nuts_hurst.py")
    short = dataclasses.replace(sampler, num_warmup=2, num_samples=2, num_chains=1)
    first = gk.Problem(module.model, args=(module.flow[:20], np.arange(2, 20, 5)))
    samples = gk.infer(first, short, key=jax.random.key(0)).samples
    assert samples["hurst"].shape == (1, 2)
    assert samples["withheld"].shape == (1, 2, 4)
    assert all(bool(np.isfinite(v).all()) for v in samples.values())


def test_pictures_of_weighted_paths(tmp_path):
    """Paths without weight leave no trace; a count of weights that does not fit is refused."""
    rng, ts = np.random.default_rng(0), np.arange(5.0)
    x = np.cumsum(rng.normal(size=(20, 5)), axis=1)
    twice, log_weight = np.concatenate([x, x + 100]), np.concatenate([np.zeros(20), np.full(20, -1e3)])
    indices = _processes._representatives(log_weight, 40)
    assert sorted(indices) == sorted([*range(20)] * 2)
    gk.io.plot_paths(tmp_path / "weighted.png", ts, twice, log_weight=log_weight)
    assert matplotlib.image.imread(tmp_path / "weighted.png")[..., :3].std() > 0.01
    with pytest.raises(ValueError, match="`log_weight` must be of shape"):
        gk.io.plot_paths(tmp_path / "none.png", ts, twice, log_weight=np.zeros(3))


def test_pictures(tmp_path):
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.normal(size=(20, 5, 2)), axis=1)
    observed = (np.array([1.0, 3.0]), np.array([[0.0, 1.0], [np.nan, 1.0]]))
    gk.io.plot_paths(tmp_path / "paths.png", np.arange(5.0), x, observed=observed)
    gk.io.plot_hurst(tmp_path / "hurst.png", rng.beta(9, 3, size=(2, 50)), reference=(0.8, 0.06))
    gk.io.plot_covariance_error(tmp_path / "error.png", [0.3, 0.7], {"default": [5e-4, 1e-4], "cheap": [3e-3, 1e-3]})
    for name in ("paths", "hurst", "error"):
        image = matplotlib.image.imread(tmp_path / f"{name}.png")
        assert image.ndim == 3 and image[..., :3].std() > 0.01


def test_pictures_refuse_what_they_cannot_show(tmp_path):
    out = tmp_path / "x.png"
    with pytest.raises(ValueError, match="of shape"):
        gk.io.plot_paths(out, np.arange(4.0), np.zeros((3, 5)))
    with pytest.raises(ValueError, match="finite"):
        gk.io.plot_paths(out, np.arange(2.0), np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="draws"):
        gk.io.plot_hurst(out, [0.5])
    with pytest.raises(ValueError, match="errors"):
        gk.io.plot_covariance_error(out, [0.5], {})
    assert not out.exists()
