"""Networks as denoisers: every prediction exact on Gaussian data, both ends, wrong input."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import genkit as gk
from genkit._core._fields import trainable


d = gk.diffusion
MEAN, VAR = 0.4, 0.25
CASES = {
    "F": d.EDM,
    "eps": d.VP,
    "v": d.Cosine,
    "x0": d.SubVP,
    "velocity": d.CondOT,
    "score": lambda: d.VE(0.01, 50.0),
    "eps, straight": d.CondOT,
    "velocity, VP": d.VP,
    "v, straight": d.CondOT,
}
LEVELS = [0.0, 1e-4, 0.05, 1.0, 20.0]


def perfect(prediction: str, schedule):
    """The network that predicts exactly, for scalar-variance Gaussian data, in its own coordinates."""
    gaussian = d.GaussianDenoiser(jnp.full(2, MEAN), jnp.array(VAR))
    if prediction == "F":
        sigma_data = 0.5

        def net(x, t, cond):
            sigma = jnp.exp(4 * t)
            norm = jnp.sqrt(sigma_data**2 + sigma**2)
            clean = gaussian(x * norm, sigma)
            return (clean - (sigma_data / norm) ** 2 * x * norm) / (sigma * sigma_data / norm)

        return net

    def net(x, t, cond):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        clean = gaussian(x / alpha, sigma / alpha)
        rates = {"alpha_dot": schedule.alpha_dot(t), "sigma_dot": schedule.sigma_dot(t)}
        return d.convert(clean, "x0", prediction, x, alpha, sigma, **rates)

    return net


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sigma", LEVELS)
def test_perfect_network_gives_the_exact_denoiser(name, sigma, x64):
    prediction, schedule = name.split(",")[0], CASES[name]()
    denoiser = d.Preconditioned(perfect(prediction, schedule), prediction, sigma_data=0.5, schedule=schedule)
    x = jnp.array([1.3, -0.2]) * (1 + sigma)
    want = np.asarray(x) if sigma == 0 else MEAN + VAR / (VAR + sigma**2) * (np.asarray(x) - MEAN)
    np.testing.assert_allclose(denoiser(x, jnp.array(sigma)), want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["F", "eps", "v", "x0", "velocity", "score"])
def test_float32_finite_with_finite_gradients_at_every_level(name):
    schedule = CASES[name]()
    denoiser = d.Preconditioned(lambda x, t, cond: jnp.tanh(x) * (1 + t), name, schedule=schedule)
    x = jnp.array([1.3, -0.2])
    for sigma in (0.0, 1e-8, 1e-3, 1.0, 1e3):
        y = x * (1 + sigma)
        value = denoiser(y, jnp.array(sigma))
        slope = jax.grad(lambda y, sigma=sigma: jnp.sum(denoiser(y, jnp.array(sigma))))(y)
        assert value.dtype == jnp.float32
        assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope))


def test_far_end_of_a_straight_path_keeps_its_digits():
    # At noise level 1e6 the time is 1 - 1e-6, which float32 rounds by 6 % of its distance to 1: the state that the
    # network sees must still be right to rounding.
    seen = []

    def net(x, t, cond):
        seen.append(x)
        return x

    denoiser = d.Preconditioned(net, "velocity", schedule=d.CondOT())
    eps = jnp.array([0.7, -1.1])
    denoiser(1e6 * eps, jnp.array(1e6))
    np.testing.assert_allclose(seen[0], eps / (1 + 1e-6), rtol=3e-6)


def test_condition_and_attributes_are_forwarded():
    net = gk.nn.MLP((2,), width=8, depth=1, num_labels=3, key=jax.random.key(0))
    denoiser = d.Preconditioned(net)
    assert denoiser.shape == (2,) and denoiser.num_labels == 3
    bare = d.Preconditioned(lambda x, t, cond: x if cond is None else cond * x)
    assert bare.shape is None and bare.num_labels is None
    assert not np.allclose(bare(jnp.ones(2), jnp.array(1.0)), bare(jnp.ones(2), jnp.array(1.0), jnp.array(2.0)))


def test_net_input_of_f():
    seen = []

    def net(x, t, cond):
        seen.append((x, t))
        return jnp.zeros_like(x)

    d.Preconditioned(net, sigma_data=3.0)(jnp.array([10.0]), jnp.array(4.0))
    np.testing.assert_allclose(seen[0][0], [2.0], rtol=1e-6)
    np.testing.assert_allclose(seen[0][1], np.log(4.0) / 4, rtol=1e-6)


def test_sigma_data_and_schedule_are_not_trained_but_traced():
    net = gk.nn.MLP((2,), width=4, depth=1, key=jax.random.key(0))
    denoiser = d.Preconditioned(net, "eps", sigma_data=0.5, schedule=d.VP(0.2, 10.0))
    marks = trainable(denoiser)
    assert not marks.sigma_data and not marks.schedule.beta_min and not marks.schedule.beta_max
    assert all(jax.tree.leaves(marks.net)) and len(jax.tree.leaves(marks.net)) == len(jax.tree.leaves(net))
    assert jax.tree.structure(marks) == jax.tree.structure(denoiser)
    traces = []

    @eqx.filter_jit
    def run(model, x):
        traces.append(1)
        return model(x, jnp.array(1.0))

    for sigma_data in (0.5, 0.7):
        run(d.Preconditioned(net, "eps", sigma_data=sigma_data, schedule=d.VP(sigma_data, 10.0)), jnp.ones(2))
    assert len(traces) == 1


def test_trainable_on_plain_trees():
    tree = {"a": [jnp.ones(2), 3, "text"], "b": None, "c": (jnp.arange(2), np.ones(1))}
    marks = trainable(tree)
    assert jax.tree.structure(marks) == jax.tree.structure(tree)
    assert jax.tree.leaves(marks) == [True, False, False, False, True]
    assert trainable(jnp.ones(1)) is True
    assert jax.tree.leaves(trainable(d.VP())) == [True, True]


def test_wrong_input():
    net = lambda x, t, cond: x
    with pytest.raises(ValueError, match="`prediction` must be one of .* got 'epsilon'. Did you mean 'eps'"):
        d.Preconditioned(net, "epsilon")
    with pytest.raises(ValueError, match="`sigma_data` must be positive"):
        d.Preconditioned(net, sigma_data=0.0)
    with pytest.raises((ValueError, TypeError)):
        d.Preconditioned(net, schedule="VP")
