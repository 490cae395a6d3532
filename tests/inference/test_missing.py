"""Missing observations: closed forms, with discrete ones summed out."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.handlers import seed, trace
from numpyro.infer.util import log_density

import genkit as gk


pytestmark = pytest.mark.key_reuse  # numpyro's handlers split one key several times

Y = np.array([0.1, 1.2, 0.9, -0.3, 0.6, 1.5])
X = np.array([0, 1, 0, 0, 0, 0])
SEEN = np.array([True, True, False, True, False, False])


def regression(x, y):
    """A binary covariate with gaps."""
    q = numpyro.sample("q", dist.Beta(1.0, 1.0))
    with numpyro.plate("n", 6):
        x = numpyro.sample("x", dist.Bernoulli(q), obs=x)
        numpyro.sample("y", dist.Normal(1.0 * x, 0.5), obs=y)


def test_missing_labels_are_summed_out():
    model = gk.vi.marginalize(gk.vi.impute(regression, {"x": SEEN}))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    q = (nodes + 1) / 2
    with jax.enable_x64(True):
        at = lambda q: log_density(model, (X, Y), {}, {"q": q})[0]
        mass = weights / 2 * np.exp(np.asarray(jax.jit(jax.vmap(at))(q)))

        def filled(q, key):
            return trace(seed(numpyro.handlers.substitute(model, data={"q": q}), key)).get_trace(X, Y)["x_missing"][
                "value"
            ]

        rows = jr.choice(jr.key(0), q, (20_000,), p=mass / mass.sum())
        drawn = np.asarray(jax.jit(jax.vmap(filled))(rows, jr.split(jr.key(1), 20_000)))
    np.testing.assert_allclose(np.log(mass.sum()), -6.526905753, rtol=1e-9)
    exact = np.array([0.83748693, 0.64032695, 0.98032832])
    assert np.all(np.abs(drawn[:, ~SEEN].mean(0) - exact) < 5.0 * np.sqrt(exact * (1 - exact) / 20_000))


def level(y):
    m = numpyro.sample("m", dist.Normal(0.0, 2.0))
    with numpyro.plate("n", y.shape[0]):
        numpyro.sample("y", dist.Normal(m, np.array([0.5, 1.0, 2.0, 0.7])), obs=y)


GAPS = np.array([1.0, np.nan, 0.2, np.nan])


def test_the_density_is_that_of_all_members():
    model = gk.vi.impute(level, {"y": ~np.isnan(GAPS)})
    with jax.enable_x64(True):
        found = log_density(model, (GAPS,), {}, {"m": 0.3, "y_missing": jnp.array([0.4, -1.0])})[0]
        whole = log_density(level, (np.array([1.0, 0.4, 0.2, -1.0]),), {}, {"m": 0.3})[0]
    np.testing.assert_allclose(found, whole, rtol=1e-12)


@pytest.mark.parametrize("method", [gk.mcmc.NUTS(300, 1000, num_chains=2), gk.vi.Fit("full_rank", num_steps=800)])
def test_nan_are_drawn_with_the_rest(method):
    with pytest.warns(UserWarning, match=r"missing values.*'y' \(2 of 4\)"):
        result = gk.infer(gk.Problem(level, (GAPS,)), method, key=jr.key(0))
    assert result.attrs["imputed"] == "y"
    np.testing.assert_array_equal(result.observed["y"], np.float32(GAPS))
    precision = 1 / 4 + 1 / 0.25 + 1 / 4
    mean = (1.0 / 0.25 + 0.2 / 4) / precision
    m = result.samples["m"].ravel()
    missing = result.samples["y_missing"].reshape(-1, 2)
    assert abs(m.mean() - mean) < 0.1 and abs(m.std() - precision**-0.5) < 0.06
    assert np.all(np.abs(missing.mean(0) - mean) < 0.2)
    assert np.all(np.abs(missing.std(0) - np.sqrt(1 / precision + np.array([1.0, 0.49]))) < 0.15)


def test_supports_of_the_missing_members_are_kept():
    def model(y):
        numpyro.sample("y", dist.Uniform(np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 7.0])), obs=y)

    filled = gk.vi.impute(model, {"y": np.array([True, False, False])})
    site = trace(seed(filled, jr.key(0))).get_trace(np.array([0.5, np.nan, np.nan]))["y_missing"]
    support = site["fn"].support
    assert bool(support(jnp.array([2.9, 6.9]))) and not bool(support(jnp.array([0.5, 6.9])))
    assert bool(support(site["value"]))


def test_wrong_masks_are_named():
    with pytest.raises(TypeError, match=r"masks\['y'\].*Boolean"):
        gk.vi.impute(level, {"y": np.zeros(4)})
    with pytest.raises(ValueError, match=r"'y' must have the shape \(4,\).*\(3,\)"):
        seed(gk.vi.impute(level, {"y": np.array([True, False, True])}), jr.key(0))(GAPS)
    with pytest.raises(ValueError, match="'z' .observed: y"):
        seed(gk.vi.impute(level, {"z": np.array([True])}), jr.key(0))(GAPS)


def test_masked_arrays_say_what_is_missing():
    masked = np.ma.masked_array([1, 0, 1], mask=[False, True, False])
    (stored,) = gk.vi.impute(regression, {"x": masked}).masks  # pyright: ignore[reportFunctionMemberAccess]
    assert stored[0] == "x" and np.frombuffer(stored[2], bool).tolist() == [True, False, True]


def test_gaps_in_a_loop():
    """numpyro's chains see the stacked site; programs see single steps, and say what to do."""

    def model(y):
        def step(x, y):
            x = numpyro.sample("x", dist.Normal(x, 1.0))
            numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
            return x, None

        scan(step, 0.0, y)

    problem = gk.Problem(model, (np.array([0.1, np.nan, 0.4]),))
    with pytest.warns(UserWarning, match="'y' .1 of 3"):
        result = gk.infer(problem, gk.mcmc.NUTS(300, 1500, num_chains=2), key=jr.key(0))
    # Steps of variance 1 from 0, seen at 1 and 3 with variance 1/4.
    prior = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]])
    seen = [0, 2]
    gain = prior[:, seen] @ np.linalg.inv(prior[np.ix_(seen, seen)] + 0.25 * np.eye(2))
    mean = gain @ [0.1, 0.4]
    sd = np.sqrt(np.diag(prior - gain @ prior[seen]))
    x = result.samples["x"].reshape(-1, 3)
    assert np.all(np.abs(x.mean(0) - mean) < 0.12 * sd) and np.all(np.abs(x.std(0) / sd - 1) < 0.1)
    assert abs(result.samples["y_missing"].std() - np.hypot(sd[1], 0.5)) < 0.1
    with (
        pytest.warns(UserWarning, match="missing values"),
        pytest.raises(ValueError, match=r"mask of site 'y'.*mask\(seen\)"),
    ):
        gk.infer(problem, gk.vi.Fit(num_steps=10), key=jr.key(0))
