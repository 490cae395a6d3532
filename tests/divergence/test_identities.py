"""The identities that tie value, weight, reward, critic and dual together, by quadrature, for every divergence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from genkit import NonFiniteError, divergence as gd


pytestmark = pytest.mark.usefixtures("x64")
X = np.linspace(-20.0, 20.0, 2001)
DX = X[1] - X[0]
START = np.array([0.3, 1.3])
NOISE = 0.5  # variance at which the derivative in the noise is taken

ALL = {
    "ReverseKL": gd.ReverseKL,
    "ForwardKL": gd.ForwardKL,
    "JensenShannon": gd.JensenShannon,
    "SoftenedReverseKL": gd.SoftenedReverseKL,
    "SoftenedForwardKL": gd.SoftenedForwardKL,
    "SquaredHellinger": gd.SquaredHellinger,
    "PearsonChi2": gd.PearsonChi2,
    "NeymanChi2": gd.NeymanChi2,
    "Jeffreys": gd.Jeffreys,
    "LeCam": gd.LeCam,
    "Alpha(0.3)": lambda: gd.Alpha(0.3),
    "Alpha(0)": lambda: gd.Alpha(0.0),
    "TotalVariation(0.5)": lambda: gd.TotalVariation(0.5),
    "user f": lambda: gd.from_f(lambda r: (r**1.5 - 1) + 3 * (1 - r)),
    "user weight": lambda: gd.from_weight(lambda u: jnp.exp(0.4 * u) + 0.2),
    "sum": lambda: gd.ForwardKL() + 0.5 * gd.LeCam(),
    "skew": lambda: gd.ForwardKL().skew(0.3),
    "dual": lambda: gd.SoftenedForwardKL().dual(),
}


def log_p(x, v):
    parts = [jnp.log(w) - 0.5 * (x - m) ** 2 / (s**2 + v) - 0.5 * jnp.log(2 * jnp.pi * (s**2 + v))
             for w, m, s in ((0.65, -1.5, 0.7), (0.35, 1.5, 1.0))]  # fmt: skip
    return jnp.logaddexp(*parts)


def log_q(x, theta, v):
    total = theta[1] ** 2 + v
    return -0.5 * (x - theta[0]) ** 2 / total - 0.5 * jnp.log(2 * jnp.pi * total)


@functools.cache
def facts():
    """Both sides of every identity, one row per divergence, in one program."""
    family = [make() for make in ALL.values()]
    stack = lambda method, u: jnp.stack([getattr(divergence, method)(u) for divergence in family])
    integral = lambda y: jnp.sum(y, -1) * DX

    def values(theta, v):
        u = log_p(X, v) - log_q(X, theta, v)
        return integral(jnp.exp(log_q(X, theta, v)) * stack("phi", u))

    def everything(theta):
        at = lambda v: (log_p(X, v) - log_q(X, theta, v), jnp.exp(log_p(X, v)), jnp.exp(log_q(X, theta, v)))
        gap = lambda v: jax.vmap(jax.grad(lambda x: log_p(x, v) - log_q(x, theta, v)))(jnp.asarray(X))
        (u, p, q), (un, _, qn) = at(0.0), at(NOISE)
        directions = jnp.stack([jnp.ones_like(u), (X - theta[0]) / theta[1]])[:, None]
        scores = jax.vmap(jax.grad(log_q, argnums=1), in_axes=(0, None, None))(jnp.asarray(X), theta, 0.0).T[:, None]
        direct, rewards = jax.jacfwd(values)(theta, 0.0).T, stack("reward", u)
        exact = values(theta, 0.0)
        return {
            "pathwise": (-integral(q * stack("weight", u) * gap(0.0) * directions), direct),
            "score function": (-integral(q * rewards * scores), direct),
            "dual bound": (integral(p * stack("critic", u)) - integral(q * rewards), exact),
            "de Bruijn": (
                -0.5 * integral(qn * stack("weight", un) * gap(NOISE) ** 2),
                jax.jacfwd(values, argnums=1)(theta, NOISE),
            ),
            "exchange": (integral(p * jnp.stack([d.dual().phi(-u) for d in family])), exact),
        }

    return jax.tree.map(np.asarray, jax.jit(everything)(jnp.asarray(START)))


@pytest.mark.parametrize("name", ALL)
def test_identities(name):
    row = list(ALL).index(name)
    for identity, (left, right) in facts().items():
        message = f"{identity} of {name}"
        np.testing.assert_allclose(left[..., row], right[..., row], rtol=1e-6, atol=1e-6, err_msg=message)


def test_reward_is_exact_and_the_weight_its_derivative():
    family, u = [make() for make in ALL.values()], jnp.linspace(-3, 3, 13)
    stack = lambda method: lambda u: jnp.stack([getattr(divergence, method)(u) for divergence in family])

    @jax.jit
    def derived(u):
        (phi, slope), (_, weight) = (jax.jvp(stack(m), (u,), (jnp.ones_like(u),)) for m in ("phi", "reward"))
        return slope - phi, weight, stack("reward")(u), stack("weight")(u)

    reward, weight, given_reward, given_weight = derived(u)
    np.testing.assert_allclose(given_reward, reward, atol=1e-6)
    np.testing.assert_allclose(given_weight, weight, rtol=1e-6, atol=1e-7)


def test_skewing_the_forward_kl_gives_jensen_shannon():
    half = gd.ForwardKL().skew(0.5)
    both = half + half.dual().dual().dual()  # KL(p | m) + KL(q | m), the second by exchange
    u = np.linspace(-4, 4, 9)
    np.testing.assert_allclose(both.weight(u), gd.JensenShannon().weight(u), rtol=1e-12)


def test_bound_is_below_the_value_and_tight_at_the_ratio():
    rng = np.random.default_rng(0)
    x_p, x_q = rng.normal(0.5, 1.0, 4000), rng.normal(0.0, 1.0, 4000)
    ratio = lambda x: 0.5 * x - 0.125
    for divergence in (gd.JensenShannon(), gd.ForwardKL(), gd.SquaredHellinger()):
        exact = float(divergence.bound(ratio(x_p), ratio(x_q)))
        assert exact > float(divergence.bound(ratio(x_p) + 0.5, ratio(x_q) + 0.5))
        assert exact > float(divergence.bound(2 * ratio(x_p), 2 * ratio(x_q)))


def test_value_and_normalization():
    u = np.log(np.array([0.5, 1.0, 1.5]))
    zero = np.zeros(3)
    np.testing.assert_allclose(gd.PearsonChi2().value(u, zero), 0.5 / 3, rtol=1e-12)
    np.testing.assert_allclose(gd.PearsonChi2().value(u + 7.0, zero, normalize=True), 0.5 / 3, rtol=1e-12)
    bins = gd.rank_bins(np.array([5.0, 0.1, 4.0, 0.2]), 2)
    shifted = gd.self_normalize(np.array([1.0, -2.0, 1.0, -2.0]), bins, 2)
    np.testing.assert_allclose(shifted, 0, atol=1e-12)
    found = gd.diagnose(np.log(np.array([1.0, 3.0])), np.array([1.0, 3.0]), clip=1.0)
    np.testing.assert_allclose(found["ess"], 16 / 20)
    np.testing.assert_allclose([found["clipped"], found["mean_ratio"]], [0.5, 2.0])
    huge = gd.diagnose(np.zeros(2), np.array([1e300, 1e300]))
    np.testing.assert_allclose(huge["ess"], 1.0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: gd.from_f(lambda r: (r - 1) ** 2 + 0.5), r"f\(1\) = 0.5"),
        (lambda: gd.from_f(jnp.log), "convex"),
        (lambda: gd.from_f(lambda r: (r - 1) ** 2 * jnp.cos(r)), "convex"),
        (lambda: gd.from_f(lambda r: jnp.sqrt(r - 1)), "finite"),
        (lambda: gd.from_weight(jnp.sin), "non-negative"),
        (lambda: gd.from_weight(lambda u: jnp.abs(u)), "positive at u = 0"),
        (lambda: gd.from_weight(lambda u: jnp.sum(u)), "elementwise"),
        (lambda: -1.0 * gd.ForwardKL(), "non-negative"),
        (lambda: gd.ForwardKL().skew(1.0), "share"),
        (lambda: gd.TotalVariation().skew(0.5).weight(0.0), "kink"),
        (lambda: gd.from_f(lambda r: jnp.maximum(r - 1, 0) + 0.1 * (r - 1) ** 2).weight(0.3), "kink"),
        (lambda: (gd.ReverseKL() + gd.TotalVariation()).weight(0.3), "smoothing"),
        (lambda: gd.self_normalize(jnp.zeros(3), None, 0), "num_bins"),
    ],
)
def test_wrong_input(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_overflowing_ratio_is_named():
    with pytest.raises(NonFiniteError, match="log-ratio is 1000"):
        gd.PearsonChi2().value(np.array([0.0, 1000.0]), np.zeros(2))
    assert not (gd.ReverseKL() + gd.TotalVariation()).pathwise
