"""Discrete sites summed out: closed forms, and every small model against the sum over all joint values."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import cond, scan
from numpyro.handlers import mask, scale, seed, substitute, trace
from numpyro.infer.util import log_density

import genkit as gk
from genkit import vi


pytestmark = pytest.mark.key_reuse  # numpyro's handlers split one key several times


def density(model, values, *args):
    with jax.enable_x64(True):
        values = jax.tree.map(jnp.asarray, values)  # loops cannot take NumPy arrays step by step
        return float(jax.jit(lambda: log_density(model, args, {}, values)[0])())


def by_enumeration(model, sites, values, *args):
    """Log of the sum of the joint density over all values of the discrete sites, each {name: (outcomes, shape)}."""
    names = list(sites)
    axes = [list(itertools.product(sites[n][0], repeat=int(np.prod(sites[n][1], dtype=int)))) for n in names]
    joint = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*axes)]
    stacked = {n: np.array([j[n] for j in joint]).reshape(len(joint), *sites[n][1]) for n in names}
    with jax.enable_x64(True):
        one = lambda z: log_density(model, args, {}, {**values, **z})[0]
        if len(joint) <= 4:  # numpyro's binomial wants to know its counts
            each = jnp.stack([one({n: jnp.asarray(v[i]) for n, v in stacked.items()}) for i in range(len(joint))])
        else:
            each = jax.jit(jax.vmap(one))(stacked)
        return float(jax.scipy.special.logsumexp(each))


Y = np.array([-1.2, -0.8, 0.3, 1.9, 2.2, -0.5])


def mixture(y):
    w = numpyro.sample("w", dist.Beta(2.0, 3.0))
    with numpyro.plate("n", 6):
        z = numpyro.sample("z", dist.Bernoulli(w))
        numpyro.sample("y", dist.Normal(jnp.where(z == 1, -1.0, 2.0), jnp.where(z == 1, 0.7, 0.5)), obs=y)


def test_a_mixture_has_its_evidence():
    nodes, weights = np.polynomial.legendre.leggauss(60)
    w = (nodes + 1) / 2
    with jax.enable_x64(True):
        model = vi.marginalize(mixture)
        values = jax.jit(jax.vmap(lambda w: log_density(model, (Y,), {}, {"w": w})[0]))(w)
    mass = weights / 2 * np.exp(values)
    np.testing.assert_allclose(np.log(mass.sum()), -9.491610398, rtol=1e-9)
    np.testing.assert_allclose((w * mass).sum() / mass.sum(), 0.543322599, rtol=1e-9)


A = np.array([[0.9, 0.1], [0.2, 0.8]])
SERIES = np.sin(0.5 * np.arange(24))


def emit(name, z, y):
    numpyro.sample(name, dist.Normal(jnp.array([-1.0, 1.0])[z], jnp.array([1.0, 0.7])[z]), obs=y)


def hmm(loop):
    def model(y):
        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(jnp.asarray(A)[z]))
            emit("y", z, y)
            return z, None

        z = numpyro.sample("z0", dist.Categorical(jnp.array([0.5, 0.5])))
        emit("y0", z, y[0])
        loop(step, z, y[1:])

    return model


@pytest.mark.parametrize("loop", [scan, vi.scan])
def test_a_hidden_markov_model_has_its_evidence(loop):
    model = vi.marginalize(hmm(loop))
    np.testing.assert_allclose(density(model, {}, SERIES), -28.830233350, rtol=1e-10)
    with jax.enable_x64(True):
        program = jax.jit(lambda: vi.program(model)(SERIES).log_density({}))()
    np.testing.assert_allclose(program, -28.830233350, rtol=1e-10)


def test_states_of_a_hidden_markov_model_are_drawn_backward():
    model = vi.marginalize(hmm(scan))

    def jumps(key):
        found = trace(seed(model, key)).get_trace(SERIES)
        z = jnp.concatenate([found["z0"]["value"][None], found["z"]["value"]])
        return jnp.sum(z[1:] != z[:-1])

    with jax.enable_x64(True):
        counts = np.asarray(jax.jit(jax.vmap(jumps))(jr.split(jr.key(0), 20_000)))
    error = np.std(counts) / np.sqrt(len(counts))
    assert abs(np.mean(counts) - 3.287619) < 5.0 * error


def two_in_a_plate(y):
    with numpyro.plate("n", 3):
        a = numpyro.sample("a", dist.Categorical(jnp.array([0.2, 0.5, 0.3])))
        b = numpyro.sample("b", dist.Bernoulli(jnp.array([0.1, 0.6, 0.8])[a]))
        numpyro.sample("y", dist.Normal(a - 2.0 * b, 0.7), obs=y)


def nested(y):
    with numpyro.plate("groups", 2, dim=-2):
        c = numpyro.sample("c", dist.Bernoulli(0.3))
        with numpyro.plate("members", 3, dim=-1):
            z = numpyro.sample("z", dist.Categorical(jnp.array([[0.2, 0.8], [0.6, 0.4]])[c]))
            numpyro.sample("y", dist.Normal(1.5 * z + c, 0.5), obs=y)


def vector(y):
    z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.2, 0.5, 0.7])).to_event(1))
    numpyro.sample("y", dist.Normal(1.0 * z, 0.5).to_event(1), obs=y)


def meeting(y):
    with numpyro.plate("n", 3):
        z = numpyro.sample("z", dist.Bernoulli(jnp.array([0.2, 0.5, 0.7])))
    numpyro.sample("y", dist.Normal(z.sum() + z[0] * z[2], 0.5), obs=y[0])


def by_hand(y):
    z = 0
    for t in range(4):
        z = numpyro.sample(f"z{t}", dist.Categorical(jnp.asarray(A)[z]))
        emit(f"y{t}", z, y[t])


def counts(y):
    n = numpyro.sample("n", dist.Binomial(3, 0.4))
    with numpyro.plate("visits", 3):
        numpyro.sample("y", dist.Binomial(jnp.array([4, 5, 6]) - n, 0.3), obs=y)


def masked(y):
    with numpyro.plate("n", 3), mask(mask=np.array([True, False, True])):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)


def tempered(y):
    with numpyro.plate("n", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        with scale(scale=0.5):
            numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)


def latent_between(y):
    with numpyro.plate("n", 3):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        x = numpyro.sample("x", dist.Normal(2.0 * z, 0.7))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def second_order(y):
    table = jnp.array([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.2, 0.8]]])

    def step(carry, y):
        before, last = carry
        z = numpyro.sample("z", dist.Categorical(table[before, last]))
        emit("y", z, y)
        return (last, z), None

    scan(step, (0, 1), y)


def counting(y):
    def step(total, y):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("y", dist.Normal(total + z, 0.6), obs=y)
        return total + z, None

    scan(step, 0, y)


def read_after(y):
    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(A)[z]))
        emit("y", z, y)
        return z, None

    last, _ = scan(step, 0, y)
    numpyro.sample("end", dist.Normal(3.0 * last, 0.5), obs=1.2)


def factorial(y):
    """Two chains and a local site in every step."""

    def step(carry, y):
        a, b = carry
        a = numpyro.sample("a", dist.Categorical(jnp.asarray(A)[a]))
        b = numpyro.sample("b", dist.Categorical(jnp.asarray(A.T / A.T.sum(1, keepdims=True))[b]))
        c = numpyro.sample("c", dist.Bernoulli(0.2 + 0.5 * a))
        numpyro.sample("y", dist.Normal(a - b + 2.0 * c, 0.5), obs=y)
        return (a, b), None

    scan(step, (0, 1), y)


def plate_of_chains(y):
    def step(z, y):
        with numpyro.plate("n", 2):
            z = numpyro.sample("z", dist.Categorical(jnp.asarray(A)[z]))
            emit("y", z, y)
        return z, None

    scan(step, np.array([0, 1]), y)


def local_in_loop(y):
    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(A)[z]))
        with numpyro.plate("n", 2):
            c = numpyro.sample("c", dist.Bernoulli(0.2 + 0.5 * z))
            numpyro.sample("y", dist.Normal(c + z, 0.5), obs=y)
        return z, None

    scan(step, 1, y)


def beside_the_chain(y):
    """A site of every step that does not meet the chain, in the first step neither."""

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(jnp.asarray(A)[z]))
        emit("y", z, y)
        b = numpyro.sample("b", dist.Bernoulli(0.3))
        numpyro.sample("x", dist.Normal(2.0 * b, 0.7), obs=-y)
        return z, None

    scan(step, 1, y)


def named_like_steps(y):
    """Names that look as if they were made by a loop."""
    z = 0
    for t in range(3):
        z = numpyro.sample(f"z[{t}]", dist.Categorical(jnp.asarray(A)[z]))
        emit(f"y[{t}]", z, y[t])


def uniform(y):
    """Densities that do not look at the value, in a plate and in a loop."""
    with numpyro.plate("n", 3):
        u = numpyro.sample("u", dist.DiscreteUniform(0, 2))
        numpyro.sample("x", dist.Normal(1.0 * u, 0.7), obs=y)

    def step(carry, y):
        z = numpyro.sample("z", dist.DiscreteUniform(0, 1))
        numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)
        return carry, None

    scan(step, 0, y)


def apart_in_loop(y):
    def step(carry, y):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)
        return carry, None

    scan(step, 0, y)


def switched(y):
    s = numpyro.sample("s", dist.Bernoulli(0.4))

    def step(z, y):
        z = numpyro.sample("z", dist.Categorical(jnp.where(s == 1, A, A[::-1])[z]))
        emit("y", z, y)
        return z, None

    scan(step, s, y, reverse=True)


BITS = [0, 1]
CASES = {
    "two in a plate": (two_in_a_plate, {"a": ([0, 1, 2], (3,)), "b": (BITS, (3,))}, {}, Y[:3]),
    "nested plates": (nested, {"c": (BITS, (2, 1)), "z": (BITS, (2, 3))}, {}, Y.reshape(2, 3)),
    "to_event": (vector, {"z": (BITS, (3,))}, {}, Y[:3]),
    "members that meet": (meeting, {"z": (BITS, (3,))}, {}, Y),
    "a chain by hand": (by_hand, {f"z{t}": (BITS, ()) for t in range(4)}, {}, Y),
    "binomial": (counts, {"n": ([0, 1, 2, 3], ())}, {}, np.array([1, 0, 2])),
    "tempered": (tempered, {"z": (BITS, (3,))}, {}, Y[:3]),
    "a latent between": (latent_between, {"z": (BITS, (3,))}, {"x": Y[3:]}, Y[:3]),
    "second order": (second_order, {"z": (BITS, (4,))}, {}, Y[:4]),
    "counting": (counting, {"z": (BITS, (4,))}, {}, Y[:4]),
    "read after the loop": (read_after, {"z": (BITS, (4,))}, {}, Y[:4]),
    "factorial": (factorial, dict.fromkeys("abc", (BITS, (3,))), {}, Y[:3]),
    "a plate of chains": (plate_of_chains, {"z": (BITS, (3, 2))}, {}, Y.reshape(3, 2)),
    "local in a loop": (local_in_loop, {"z": (BITS, (2,)), "c": (BITS, (2, 2))}, {}, Y[:4].reshape(2, 2)),
    "beside the chain": (beside_the_chain, {"z": (BITS, (3,)), "b": (BITS, (3,))}, {}, Y[:3]),
    "named like steps": (named_like_steps, {f"z[{t}]": (BITS, ()) for t in range(3)}, {}, Y[:3]),
    "uniform": (uniform, {"u": ([0, 1, 2], (3,)), "z": (BITS, (3,))}, {}, Y[:3]),
    "apart in a loop": (apart_in_loop, {"z": (BITS, (4,))}, {}, Y[:4]),
    "switched, backward": (switched, {"s": (BITS, ()), "z": (BITS, (4,))}, {}, Y[:4]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sum_over_all_joint_values(case):
    model, sites, values, y = CASES[case]
    expected = by_enumeration(model, sites, values, y)
    np.testing.assert_allclose(density(vi.marginalize(model), values, y), expected, rtol=1e-10)


@pytest.mark.parametrize(
    "case",
    ["nested plates", "local in a loop", "a plate of chains", "second order", "beside the chain", "named like steps"],
)
def test_drawn_states_have_their_frequencies(case):
    """Every joint value against its exact probability; the sum of all is the density."""
    model, sites, values, y = CASES[case]
    names = sorted(sites)
    marginal = vi.marginalize(model)

    def draw(key):
        found = trace(seed(substitute(marginal, data=values), key)).get_trace(y)
        return jnp.concatenate([found[name]["value"].ravel() for name in names])

    count = 20_000
    with jax.enable_x64(True):
        drawn = np.asarray(jax.jit(jax.vmap(draw))(jr.split(jr.key(1), count)))
    whole = density(marginal, values, y)
    likely, seen = np.unique(drawn, axis=0, return_counts=True)
    for row, times in zip(likely[np.argsort(-seen)][:12], np.sort(-seen)[:12], strict=True):
        parts = np.split(row, np.cumsum([int(np.prod(sites[n][1], dtype=int)) for n in names])[:-1])
        state = {n: part.reshape(sites[n][1]) for n, part in zip(names, parts, strict=True)}
        p = np.exp(density(model, {**values, **state}, y) - whole)
        assert abs(-times / count - p) < 5.0 * np.sqrt(p * (1 - p) / count)


def masked_inside(y):
    seen = np.array([True, False, True])
    z = numpyro.sample("z", dist.Bernoulli(np.array([0.2, 0.5, 0.7])).mask(seen).to_event(1))
    numpyro.sample("y", dist.Normal(1.0 * z, 0.5).mask(seen).to_event(1), obs=y)


@pytest.mark.parametrize("masked", [masked, masked_inside])
def test_masked_members_contribute_nothing(masked):
    expected = by_enumeration(masked, {"z": (BITS, (3,))}, {}, Y[:3]) - np.log(2)  # the masked member's two outcomes
    np.testing.assert_allclose(density(vi.marginalize(masked), {}, Y[:3]), expected, rtol=1e-10)


def test_counts_without_an_end_need_a_bound():
    def model(y):
        n = numpyro.sample("n", dist.Poisson(2.0))
        numpyro.sample("y", dist.Normal(1.0 * n, 0.5), obs=y)

    with pytest.raises(ValueError, match=r"'n' \(Poisson\).*no end.*sites="):
        density(vi.marginalize(model), {}, 3.0)
    expected = by_enumeration(model, {"n": (range(41), ())}, {}, 3.0)
    np.testing.assert_allclose(density(vi.marginalize(model, {"n": 40}), {}, 3.0), expected, rtol=1e-10)


def test_wrong_input_is_named():
    with pytest.raises(TypeError, match="`sites`"):
        vi.marginalize(mixture, "z")
    with pytest.raises(ValueError, match="'q'.*its discrete sites: z"):
        density(vi.marginalize(mixture, ["q"]), {"w": 0.5}, Y)
    with pytest.raises(ValueError, match=r"max_paths=4.*8 joint states.*'z'"):
        density(vi.marginalize(meeting, max_paths=4), {}, Y)
    with pytest.raises(ValueError, match="'z' must not be given from outside"):
        density(substitute(vi.marginalize(mixture), data={"z": np.zeros(6, int)}), {"w": 0.5}, Y)


def test_gradients_agree_with_finite_differences():
    def model(y, shift):
        def step(z, y):
            z = numpyro.sample("z", dist.Categorical(jnp.asarray(A)[z]))
            numpyro.sample("y", dist.Normal(shift * z, 0.7), obs=y)
            return z, None

        scan(step, 1, y)

    with jax.enable_x64(True):
        value = lambda shift: log_density(vi.marginalize(model), (Y, shift), {}, {})[0]
        slope = float(jax.jit(jax.grad(value))(1.3))
        ends = np.asarray(jax.jit(jax.vmap(value))(jnp.array([1.3 - 1e-5, 1.3 + 1e-5])))
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-5, rtol=1e-7)


def test_a_subsampled_plate_scales_the_sums_of_its_members():
    def model(y):
        with numpyro.plate("n", 6, subsample_size=2):
            rows = numpyro.subsample(y, event_dim=0)
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=rows)

    def one(y):
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)

    expected = 3.0 * sum(by_enumeration(one, {"z": (BITS, ())}, {}, Y[i]) for i in (1, 4))
    np.testing.assert_allclose(density(vi.marginalize(model), {"n": np.array([1, 4])}, Y), expected, rtol=1e-10)


def test_branches_may_observe_and_not_draw():
    def model(y, draws):
        def busy(scale):
            if draws:
                numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2.0, scale), obs=y)

        def calm(scale):
            if draws:
                numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(-1.0, scale), obs=y)

        z = numpyro.sample("z", dist.Bernoulli(0.3))
        cond(z == 1, busy, calm, 0.5)

    with pytest.raises(ValueError, match="'b' inside one"):
        density(vi.marginalize(model), {}, 1.2, True)
    expected = by_enumeration(model, {"z": (BITS, ())}, {}, 1.2, False)
    np.testing.assert_allclose(density(vi.marginalize(model), {}, 1.2, False), expected, rtol=1e-10)


def test_a_value_put_inside_is_not_summed():
    inside = vi.marginalize(substitute(mixture, data={"z": np.array([1, 1, 1, 0, 0, 1])}))
    whole = density(mixture, {"w": 0.4, "z": np.array([1, 1, 1, 0, 0, 1])}, Y)
    np.testing.assert_allclose(density(inside, {"w": 0.4}, Y), whole, rtol=1e-10)
    # One of two sites: the other is summed all the same.
    half = vi.marginalize(substitute(two_in_a_plate, data={"a": np.array([0, 2, 1])}))
    fixed = substitute(two_in_a_plate, data={"a": np.array([0, 2, 1])})
    expected = by_enumeration(fixed, {"b": (BITS, (3,))}, {}, Y[:3])
    np.testing.assert_allclose(density(half, {}, Y[:3]), expected, rtol=1e-10)


def test_what_cannot_be_summed_is_refused():
    def weighed(y):
        with numpyro.plate("n", 3), scale(scale=np.array([1.0, 2.0, 0.5])):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("y", dist.Normal(2.0 * z, 0.7), obs=y)

    with pytest.raises(ValueError, match=r"scale of site.*\(3,\)"):
        density(vi.marginalize(weighed), {}, Y[:3])

    def loop_in_loop(y):
        def step(total, y):
            z = numpyro.sample("z", dist.Bernoulli(0.4))

            def inner(carry, y):
                numpyro.sample("y", dist.Normal(1.0 * carry, 0.6), obs=y)
                return carry, None

            scan(inner, total + z, y)
            return total + z, None

        scan(step, 0, y)

    with pytest.raises(ValueError, match="loop inside a loop that is written out"):
        density(vi.marginalize(loop_in_loop), {}, Y.reshape(3, 2))


MODELS = Path(__file__).parents[2] / "models"


def test_the_coal_series_has_its_evidence():
    problem = gk.load(MODELS / "coal_changepoint.py")
    model = vi.marginalize(problem.model)
    nodes, weights = np.polynomial.legendre.leggauss(40)
    early = 1.0 + 2.5 * (nodes + 1)
    late = 0.2 + 1.2 * (nodes + 1)
    with jax.enable_x64(True):
        at = lambda early, late: log_density(model, problem.args, {}, {"early": early, "late": late})[0]
        values = np.asarray(jax.jit(jax.vmap(jax.vmap(at, (None, 0)), (0, None)))(early, late))
    mass = np.exp(values - values.max()) * np.outer(2.5 * weights, 1.2 * weights)
    np.testing.assert_allclose(np.log(mass.sum()) + values.max(), -175.801961583, rtol=1e-9)


def test_chains_draw_the_sites_that_were_summed_out():
    result = gk.infer(gk.Problem(mixture, (Y,)), gk.mcmc.NUTS(200, 500, num_chains=2), key=jr.key(0))
    assert result.attrs["summed_out"] == "z"
    assert result.samples["z"].shape == result.log_likelihood["y"].shape == (2, 500, 6)
    # Given w the members are independent, and the posterior mean of w is known.
    assert abs(result.samples["w"].mean() - 0.543322599) < 0.06
    w = result.samples["w"].reshape(-1, 1)
    ones = w * np.exp(-0.5 * ((Y + 1.0) / 0.7) ** 2) / 0.7
    zeros = (1 - w) * np.exp(-0.5 * ((Y - 2.0) / 0.5) ** 2) / 0.5
    expected = (ones / (ones + zeros)).mean(0)
    error = np.sqrt(expected * (1 - expected) / 1000)
    assert np.all(np.abs(result.samples["z"].mean((0, 1)) - expected) < 5.0 * error + 1e-3)
    np.testing.assert_allclose(
        result.log_likelihood["y"].reshape(-1, 6), np.log((ones + zeros) / np.sqrt(2 * np.pi)), rtol=1e-4
    )
    with pytest.raises(ValueError, match="discrete"):
        gk.infer(gk.Problem(mixture, (Y,)), gk.mcmc.NUTS(10, 10, marginalize=False), key=jr.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixture", "coal_changepoint", "hmm"])
def test_definition_files_run_under_chains_and_fits(name):
    problem = gk.load(MODELS / f"{name}.py")
    (site,) = gk.inference.discrete_sites(problem)
    methods = [gk.mcmc.NUTS(200, 400, num_chains=2)]
    if name != "hmm":  # a loop takes a guide half a minute to compile
        methods.append(vi.Fit("full_rank", num_steps=1000, num_samples=400))
    for method in methods:
        result = gk.infer(problem, method, key=jr.key(0))
        assert result.attrs["summed_out"] == site and np.isfinite(result.log_density).all()
        assert not any(name.startswith("failed") for name in result.attrs)
        if name == "coal_changepoint":
            assert abs(np.mean(result.samples[site]) - 39.868356) < 0.8
            assert abs(np.mean(result.samples[site] == 41) - 0.233284) < 0.08


def test_most_probable_states():
    def model(y):
        z = numpyro.sample("z", dist.Categorical(jnp.array([0.4, 0.35, 0.25])))
        b = numpyro.sample("b", dist.Bernoulli(jnp.array([0.5, 0.9, 0.1])[z]))
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(x + z, 1.0), obs=y + 0.0 * b)

    posterior = gk.Posterior({"x": np.array([0.0, -2.0])}, None, ("draw",))
    found = vi.infer_discrete(model, posterior, 0.0, key=jr.key(0), temperature=0)
    joint = np.log([[0.2, 0.2], [0.035, 0.315], [0.225, 0.025]])
    for row, x in enumerate([0.0, -2.0]):
        best = np.unravel_index(np.argmax(joint - 0.5 * (x + np.arange(3.0))[:, None] ** 2), (3, 2))
        assert (found["z"][row], found["b"][row]) == best
    with pytest.raises(ValueError, match="temperature"):
        vi.infer_discrete(model, posterior, 0.0, key=jr.key(0), temperature=2)
