"""The diffusion wing: switching samplers, eight samplers at once, likelihood of 256 points, parity with peers.

Run with `pytest tests/benchmarks/test_diffusion.py -m benchmark -s -p no:xdist -n 0`. Overhead per step against
hand-written loops is in `test_sampling.py`.
"""

import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


pytestmark = pytest.mark.benchmark
gd = gk.diffusion
GRID = gd.karras(24, 0.02, 20.0)
MAKERS = [gd.ddim, gd.ancestral, gd.dpmpp, gd.unipc, gd.deis, gd.lms, gd.sa, gd.rosenbrock]


def mixture():
    covs = jnp.array([[[0.09, 0.02], [0.02, 0.04]], [[0.04, -0.01], [-0.01, 0.09]], [[0.0625, 0.0], [0.0, 0.0625]]])
    return gd.MixtureDenoiser(jnp.array([0.5, 0.3, 0.2]), jnp.array([[-1.5, 0.0], [1.5, 0.5], [0.0, 1.5]]), covs)


def median(fn, repeats=21):
    jax.block_until_ready(fn())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn())
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def test_switching_samplers_compiles_nothing(compilations):
    law = mixture()
    run = lambda table: gk.sample(table, law, 256, key=jr.key(0)).value
    began = time.perf_counter()
    jax.block_until_ready(run(MAKERS[0](GRID)))
    first = time.perf_counter() - began
    tables = [make(GRID) for make in MAKERS[1:]]
    with compilations() as count:
        began = time.perf_counter()
        for table in tables:
            jax.block_until_ready(run(table))
        switched = (time.perf_counter() - began) / len(tables)
        assert count() == 0
    print(f"first call {first:.2f} s, each further sampler {1e3 * switched:.1f} ms")


def test_eight_samplers_in_one_vectorized_call():
    law = mixture()
    keys = jax.vmap(lambda i: jr.fold_in(jr.key(0), i))(jnp.arange(64))
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *[make(GRID) for make in MAKERS])
    draw = lambda table: gk.Sampler(table).draw(law, keys, cond=None, x_init=None, shape=(2,)).value
    one, eight = jax.jit(draw), jax.jit(jax.vmap(draw))
    alone, together = median(lambda: one(MAKERS[0](GRID))), median(lambda: eight(stack))
    print(f"one sampler {1e3 * alone:.2f} ms, eight at once {1e3 * together:.2f} ms, ratio {together / alone:.2f}")
    separate = np.stack([one(make(GRID)) for make in MAKERS])
    np.testing.assert_allclose(eight(stack), separate, rtol=2e-4, atol=2e-4)


def test_likelihood_of_256_points_against_hand_written_jax():
    import diffrax

    law = mixture()
    x = law.sample(256, key=jr.key(0))
    low, high = 0.02, 80.0

    @jax.jit
    def ours(x):
        one = lambda x: gd.log_prob(law, x, sigma_min=low, sigma_max=high, rtol=1e-4, atol=1e-4).value
        return jax.vmap(one)(x)

    @jax.jit
    def hand(x):
        ends = jnp.arctan(jnp.array([low, high]))

        def one(x):
            def field(theta, state, args):
                v = lambda z: (z * jnp.cos(theta) - law(z / jnp.cos(theta), jnp.tan(theta))) / jnp.sin(theta)
                value, push = jax.linearize(v, state[0])
                return value, jnp.trace(jax.vmap(push)(jnp.eye(2)))

            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(field), diffrax.Tsit5(), ends[0], ends[1], 0.02 * (ends[1] - ends[0]),
                (x / jnp.sqrt(1 + low**2), jnp.zeros(())), saveat=diffrax.SaveAt(t1=True),
                stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-4), max_steps=1024, throw=False,
            )  # fmt: skip
            z, volume = jax.tree.map(lambda leaf: leaf[0], solution.ys)
            stretch = jnp.log((1 + high**2) / (1 + low**2))
            return law.log_density(z * jnp.sqrt(1 + high**2), high) + volume + stretch

        return jax.vmap(one)(x)

    np.testing.assert_allclose(ours(x), hand(x), atol=1e-3)
    pairs = [(median(lambda: ours(x), 7), median(lambda: hand(x), 7)) for _ in range(3)]
    ratio = float(np.median([a / b for a, b in pairs]))
    first, second = (1e3 * seconds for seconds in pairs[0])
    print(f"likelihood of 256 points: ours {first:.1f} ms, hand-written {second:.1f} ms, ratio {ratio:.2f}")
    assert ratio < 1.25


# Parity with k-diffusion, where it is installed: same start, no noise, float64.


def test_parity_with_k_diffusion():
    torch = pytest.importorskip("torch")
    sampling = pytest.importorskip("k_diffusion.sampling")
    variances = np.array([4.0, 1.0, 0.25, 0.01])
    start = 20.0 * np.random.default_rng(0).normal(size=(3, 4))

    def model(x, sigma, **kwargs):
        v = torch.tensor(variances)
        return x * v / (v + sigma[:, None] ** 2)

    with jax.enable_x64(True):
        law = gd.GaussianDenoiser(jnp.zeros(4), jnp.asarray(variances))
        pairs = {
            "sample_euler": gd.ddim(GRID),
            "sample_heun": gd.heun(GRID),
            "sample_dpmpp_2m": gd.dpmpp(GRID),
            "sample_lms": gd.lms(GRID),
        }
        for name, table in pairs.items():
            peer = getattr(sampling, name)(model, torch.tensor(start), torch.tensor(GRID), disable=True).numpy()
            ours = gk.sample(table, law, 3, key=jr.key(0), x_init=jnp.asarray(start)).value
            gap = float(np.abs(ours - peer).max() / np.abs(peer).max())
            print(f"{name}: relative difference {gap:.1e}")
            assert gap < 1e-5
