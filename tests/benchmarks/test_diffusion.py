"""Diffusion: switching samplers, eight samplers at once, likelihood, against JAX by hand and torch peers.

Run with `pytest -o addopts="--import-mode=importlib" tests/benchmarks/test_diffusion.py -m benchmark -s`: without the
suite's own options, whose run-time type checks would count as ours. Overhead per step against hand-written loops is in
`test_sampling.py`, parity with peers in `test_diffusion_parity.py`. Peers are optional; torch runs with as many threads
as suit it best.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from peers import k_diffusion_sampling
from timing import compare, timed

import genkit as gk


pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore")]  # peers warn
gd = gk.diffusion
GRID = gd.karras(24, 0.02, 20.0)
MAKERS = [gd.ddim, gd.ancestral, gd.dpmpp, gd.unipc, gd.deis, gd.lms, gd.sa, gd.rosenbrock]
LOW, HIGH, TOLERANCE = 0.02, 80.0, 1e-4


def mixture():
    covs = jnp.array([[[0.09, 0.02], [0.02, 0.04]], [[0.04, -0.01], [-0.01, 0.09]], [[0.0625, 0.0], [0.0, 0.0625]]])
    return gd.MixtureDenoiser(jnp.array([0.5, 0.3, 0.2]), jnp.array([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.5]]), covs)


def report(name, ours, other, ratio, peer="hand-written"):
    print(f"\n{name}: ours {1e3 * ours:.2f} ms, {peer} {1e3 * other:.2f} ms, ratio {ratio:.3f}")


def test_switching_samplers_compiles_nothing(compilations):
    law = mixture()
    run = lambda table: gk.sample(table, law, 256, key=jr.key(0)).value
    first = timed(lambda: run(MAKERS[0](GRID)))
    tables = [make(GRID) for make in MAKERS[1:]]
    with compilations() as count:
        switched = [timed(lambda t=table: run(t)) for table in tables]
        assert count() == 0
    print(f"\nfirst call {first:.2f} s, each further sampler {1e3 * np.median(switched):.1f} ms")


def hand_rows(table, law, x, keys):
    """The affine recurrence written out, noise drawn in every row, as a vectorized program does."""

    def row(carry, part):
        y, base, history = carry
        i, sigma, slot, p, q, a, b, c, d, e = part
        made = p * y + q * jax.vmap(lambda y: law(y, sigma))(y)
        history = history.at[slot].set(made)
        draw = lambda key: jr.normal(jr.fold_in(jr.fold_in(key, i), 0), (2,))
        base = a * base + sum(b[k] * history[k] for k in range(4)) + c * jax.vmap(draw)(keys)
        y = d * base + sum(e[k] * history[k] for k in range(4))
        return (y, base, history), None

    names = ("sigma", "slot", "p", "q", "a", "b", "c", "d", "e")
    columns = [jnp.asarray(getattr(table, name), jnp.int32 if name == "slot" else jnp.float32) for name in names]
    start = (x, x, jnp.zeros((4, *x.shape)))
    return jax.lax.scan(row, start, (jnp.arange(table.num_rows), *columns))[0][0]


@pytest.mark.parametrize("batch", [64, 2048])
def test_eight_samplers_in_one_vectorized_call(batch):
    law = mixture()
    keys = jax.vmap(lambda i: jr.fold_in(jr.key(0), i))(jnp.arange(batch))
    x = 20.0 * jax.vmap(lambda key: jr.normal(key, (2,)))(keys)
    stack = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *[make(GRID) for make in MAKERS])
    draw = lambda table, x: gk.Sampler(table).draw(law, keys, cond=None, x_init=x, shape=(2,)).value
    one, eight = jax.jit(draw), jax.jit(jax.vmap(draw, (0, None)))
    loop_keys = jax.vmap(lambda key: jr.fold_in(key, 1))(keys)
    hand = jax.jit(jax.vmap(lambda table, x: hand_rows(table, law, x, loop_keys), (0, None)))
    first = timed(lambda: eight(stack, x)), timed(lambda: hand(stack, x))
    np.testing.assert_allclose(eight(stack, x), hand(stack, x), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(eight(stack, x), np.stack([one(make(GRID), x) for make in MAKERS]), rtol=2e-4, atol=2e-4)
    ours, other, ratio = compare(lambda: eight(stack, x), lambda: hand(stack, x), 41)
    report(f"eight samplers, {batch} draws each", ours, other, ratio)
    print(f"first call {first[0]:.2f} s against {first[1]:.2f} s")
    assert ratio <= 1.05


def larger(error):
    size = lambda leaf: jnp.sqrt(jnp.mean(leaf**2))
    return jnp.maximum(*map(size, error))


def hand_density(law, x, probe):
    """The change of variables along the flow in the angle chart, with one probe or (`None`) the exact trace."""
    ends = jnp.arctan(jnp.array([LOW, HIGH]))

    def field(theta, state, args):
        v = lambda z: (z * jnp.cos(theta) - law(z / jnp.cos(theta), jnp.tan(theta))) / jnp.sin(theta)
        value, push = jax.linearize(v, state[0])
        if probe is not None:
            return value, probe @ push(probe)
        return value, jnp.trace(jax.vmap(push)(jnp.eye(2)))

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field), diffrax.Tsit5(), ends[0], ends[1], 0.02 * (ends[1] - ends[0]),
        (x / jnp.sqrt(1 + LOW**2), jnp.zeros(())), saveat=diffrax.SaveAt(t1=True), max_steps=1024, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE, norm=larger),
    )  # fmt: skip
    z, volume = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    stretch = jnp.log((1 + HIGH**2) / (1 + LOW**2))
    return law.log_density(z * jnp.sqrt(1 + HIGH**2), HIGH) + volume + stretch


@pytest.mark.parametrize("trace", ["exact", "one probe"])
def test_likelihood_of_256_points_against_hand_written_jax(trace):
    law = mixture()
    x = law.sample(256, key=jr.key(0))
    keys = jr.split(jr.key(1), 256)
    options = {"sigma_min": LOW, "sigma_max": HIGH, "rtol": TOLERANCE, "atol": TOLERANCE}

    @jax.jit
    def ours(x):
        if trace == "exact":
            return jax.vmap(lambda x: gd.log_prob(law, x, **options).value)(x)
        return jax.vmap(lambda x, k: gd.log_prob(law, x, trace=gd.Hutchinson(1), key=k, **options).value)(x, keys)

    @jax.jit
    def hand(x):
        if trace == "exact":
            return jax.vmap(lambda x: hand_density(law, x, None))(x)
        return jax.vmap(lambda x, k: hand_density(law, x, jr.rademacher(k, (2,), jnp.float32)))(x, keys)

    first = timed(lambda: ours(x)), timed(lambda: hand(x))
    np.testing.assert_allclose(ours(x), hand(x), atol=2e-3)
    a, b, ratio = compare(lambda: ours(x), lambda: hand(x), 41)
    report(f"likelihood of 256 points, {trace}", a, b, ratio)
    print(f"first call {first[0]:.2f} s against {first[1]:.2f} s")
    assert ratio <= 1.05


# Torch peers, each at its better number of threads.


def at_best(torch, fn, repeats=9):
    """Median seconds of a torch call at the better of one and two threads."""
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        fn()
        found[threads] = float(np.median([timed(fn) for _ in range(repeats)]))
    best = min(found, key=found.get)
    torch.set_num_threads(best)
    return found[best], best


def test_likelihood_of_256_points_against_k_diffusion():
    torch = pytest.importorskip("torch")
    sampling = k_diffusion_sampling()
    law = mixture()
    x = law.sample(256, key=jr.key(0))
    weights, means, covs = (torch.tensor(np.asarray(leaf)) for leaf in (law.weights, law.means, law.covs))

    def denoise(x, sigma, **kwargs):
        total = covs + sigma[:, None, None, None] ** 2 * torch.eye(2)
        away = x[:, None] - means
        solved = torch.linalg.solve(total, away)
        logits = weights.log() - 0.5 * (torch.logdet(total) + (away * solved).sum(-1))
        each = means + (covs @ solved[..., None])[..., 0]
        return (logits.softmax(-1)[..., None] * each).sum(1)

    options = {"sigma_min": LOW, "sigma_max": HIGH, "rtol": TOLERANCE, "atol": TOLERANCE}
    y = torch.tensor(np.asarray(x))
    peer, threads = at_best(torch, lambda: sampling.log_likelihood(denoise, y, **options)[0], 3)
    keys = jr.split(jr.key(1), 256)
    one = lambda x, k: gd.log_prob(law, x, trace=gd.Hutchinson(1), key=k, **options)
    run = jax.jit(jax.vmap(one))
    timed(lambda: run(x, keys))
    ours = float(np.median([timed(lambda: run(x, keys).value) for _ in range(21)]))
    values, found = sampling.log_likelihood(denoise, y, **options)[0].numpy(), run(x, keys)
    exact = np.asarray(jax.vmap(lambda x: law.log_density(x, LOW))(x))
    report(f"likelihood of 256 points, one probe, torch on {threads}", ours, peer, ours / peer, "k-diffusion")
    print(f"mean error: ours {np.mean(found.value - exact):+.3f}, k-diffusion {np.mean(values - exact):+.3f} nats")
    assert ours < peer


class Net(eqx.Module):
    """An MLP with EDM's preconditioning at unit data variance."""

    layers: list

    def __init__(self, dim, width, *, key):
        sizes = [(dim + 1, width), (width, width), (width, dim)]
        self.layers = [eqx.nn.Linear(*size, key=k) for size, k in zip(sizes, jr.split(key, 3), strict=True)]

    def __call__(self, x, sigma, cond=None):
        norm = jnp.sqrt(1 + sigma**2)
        h = jnp.append(x / norm, jnp.log(sigma) / 4)
        for layer in self.layers[:-1]:
            h = jax.nn.relu(layer(h))
        return x / norm**2 + sigma / norm * self.layers[-1](h)


@pytest.mark.parametrize(("dim", "width", "batch"), [(2, 128, 64), (64, 256, 64), (64, 256, 1024)])
def test_sampling_against_torch_peers(dim, width, batch):
    torch = pytest.importorskip("torch")
    sampling = k_diffusion_sampling()
    schedulers = pytest.importorskip("diffusers.schedulers")
    net, grid = Net(dim, width, key=jr.key(0)), gd.karras(50, 0.02, 20.0)
    leaves = [(torch.tensor(np.asarray(layer.weight)), torch.tensor(np.asarray(layer.bias))) for layer in net.layers]
    start = 20.0 * np.asarray(jr.normal(jr.key(1), (batch, dim)))

    def torch_net(x, sigma, **kwargs):
        sigma = sigma.reshape(-1, 1)
        norm = torch.sqrt(1 + sigma**2)
        h = torch.cat([x / norm, (sigma.log() / 4).expand(len(x), 1)], 1)
        for weight, bias in leaves[:-1]:
            h = torch.relu(torch.nn.functional.linear(h, weight, bias))
        return x / norm**2 + sigma / norm * torch.nn.functional.linear(h, *leaves[-1])

    y, levels = torch.tensor(start), torch.tensor(grid, dtype=torch.float32)

    @torch.no_grad()
    def k_diffusion():
        return sampling.sample_dpmpp_2m(torch_net, y, levels, disable=True)

    @torch.no_grad()
    def diffusers():
        scheduler = schedulers.EDMDPMSolverMultistepScheduler(sigma_data=1.0, solver_order=2)
        scheduler.set_timesteps(50)
        scheduler.sigmas = levels
        scheduler.set_begin_index(0)
        x = y
        for sigma, t in zip(levels[:-1], scheduler.timesteps, strict=True):
            x0 = torch_net(x, sigma[None])
            norm = torch.sqrt(1 + sigma**2)
            x = scheduler.step((x0 - x / norm**2) * norm / sigma, t, x, return_dict=False)[0]
        return x

    table = gd.dpmpp(grid)
    ours = lambda: gk.sample(table, net, batch, key=jr.key(0), x_init=start).value
    np.testing.assert_allclose(ours(), k_diffusion().numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(ours(), diffusers().numpy(), rtol=1e-3, atol=1e-3)
    mine = float(np.median([timed(ours) for _ in range(21)]))
    for name, run in {"k-diffusion": k_diffusion, "diffusers": diffusers}.items():
        peer, threads = at_best(torch, run)
        report(f"50 steps, {dim}-{width}-{width}-{dim} at {batch}, torch on {threads}", mine, peer, mine / peer, name)
    bare = at_best(torch, lambda: [torch_net(y, levels[:1]) for _ in range(50)])[0]
    print(f"the torch network alone, 50 times: {1e3 * bare:.2f} ms")
    assert mine < peer
