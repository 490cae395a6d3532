"""Gradient steps of programs against hand-written JAX and numpyro's SVI losses: the same estimator on every side.

Run it without the run-time checks of types that the suite adds:
`python -m pytest tests/benchmarks/test_vi_steps.py -m benchmark -n 0 -s -o addopts=--import-mode=importlib`.
"""

import contextlib
import math
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO

from genkit import vi


pytestmark = [pytest.mark.benchmark, pytest.mark.key_reuse]  # timings repeat one key
PARTICLES = 64


def cone():
    x = numpyro.sample("x", dist.Normal(0.0, 10.0))
    y = numpyro.sample("y", dist.Normal(0.0, 10.0))
    r = x**2 + y**2
    numpyro.sample("z", dist.Normal(r, 0.1 + r / 100), obs=5.0)


def cone_guide(t):
    numpyro.sample("x", dist.Normal(t[0], jnp.exp(t[2])))
    numpyro.sample("y", dist.Normal(t[1], jnp.exp(t[3])))


def log_normal(x, loc, log_scale):
    return -0.5 * ((x - loc) * jnp.exp(-log_scale)) ** 2 - log_scale - 0.5 * math.log(2 * math.pi)


def hand_elbo(t, key):
    key_x, key_y = jr.split(key)
    x = t[0] + jnp.exp(t[2]) * jr.normal(key_x)
    y = t[1] + jnp.exp(t[3]) * jr.normal(key_y)
    r = x**2 + y**2
    log_p = log_normal(x, 0.0, math.log(10.0)) + log_normal(y, 0.0, math.log(10.0))
    log_p = log_p + log_normal(5.0, r, jnp.log(0.1 + r / 100))
    return log_p - log_normal(x, t[0], t[2]) - log_normal(y, t[1], t[3])


def ours(t, key):
    return vi.E(lambda: vi.elbo(vi.program(cone)(), vi.program(cone_guide)(t)))(key=key)


def by_numpyro(t, key):
    def guide():
        cone_guide(numpyro.param("t", t))

    return -Trace_ELBO().loss(key, {"t": t}, cone, guide)


def in_a_loop(fn, start, inner):
    """`inner` gradient steps of the mean over particles, as one function to compile."""

    def mean(t, key):
        return jnp.mean(jax.vmap(lambda k: fn(t, k))(jr.split(key, PARTICLES)))

    return steps_of(jax.grad(mean), start, inner)


def steps_of(slope, start, inner, rate=1e-6):
    def step(t, i):
        return jax.tree.map(lambda a, b: a + rate * b, t, slope(t, jr.fold_in(jr.key(0), i))), None

    return lambda t: jax.lax.scan(step, t, jnp.arange(inner))[0], start


def measure(loops, inner, rounds=40, compilations=3):
    """Median processor time of a step of each, run in alternation, and that of tracing and compiling it.

    Of the processor: a busy machine's wall clock tells of its neighbors.
    """
    compile_times: list = [[] for _ in loops]
    compiled: list = [None for _ in loops]
    with without_compilation_cache():
        for _ in range(compilations):
            for i, (run, start) in enumerate(loops):
                begin = time.process_time()
                fresh = jax.jit(lambda t, run=run: run(t))  # JAX remembers what it has traced by function
                compiled[i] = fresh.lower(start).compile()
                compile_times[i].append(time.process_time() - begin)
    times = [[] for _ in loops]
    for _ in range(rounds):
        for run, (_, start), seen in zip(compiled, loops, times, strict=True):
            begin = time.process_time()
            jax.block_until_ready(run(start))
            seen.append((time.process_time() - begin) / inner)
    median = lambda lists: [float(np.median(seen)) for seen in lists]
    return median(times), median(compile_times)


@contextlib.contextmanager
def without_compilation_cache():
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


NAMES = ("genkit", "by hand", "numpyro")


def report(capsys, what, times, compile_times, names=NAMES):
    with capsys.disabled():
        parts = [
            f"{n} {1e6 * t:.1f} us, compiled in {c:.2f} s" for n, t, c in zip(names, times, compile_times, strict=True)
        ]
        ratios = f"step / by hand {times[0] / times[1]:.3f}, / numpyro {times[0] / times[2]:.3f}"
        print(f"\n{what}: " + "; ".join(parts) + f"; {ratios}, compiling {compile_times[0] / compile_times[1]:.2f}")


def assert_bars(times, compile_times):
    assert times[0] <= 1.10 * times[1]
    assert times[0] <= 1.00 * times[2]
    assert compile_times[0] <= 1.5 * compile_times[1]


POINT = (2.0, 0.1, -2.0, -1.0)


def test_cone_elbo_step(capsys):
    loops = [in_a_loop(fn, jnp.array(POINT), 200) for fn in (ours, hand_elbo, by_numpyro)]
    times, compile_times = measure(loops, 200)
    report(capsys, f"cone ELBO, {PARTICLES} particles", times, compile_times)
    assert_bars(times, compile_times)


def test_cone_iwelbo_step(capsys):
    """Five importance samples each."""
    mine = lambda t, key: vi.E(lambda: vi.iwelbo(vi.program(cone)(), vi.program(cone_guide)(t), 5))(key=key)
    hand = lambda t, key: jax.nn.logsumexp(jax.vmap(lambda k: hand_elbo(t, k))(jr.split(key, 5))) - math.log(5)

    def peer(t, key):
        guide = lambda: cone_guide(numpyro.param("t", t))
        return -RenyiELBO(alpha=0.0, num_particles=5).loss(key, {"t": t}, cone, guide)

    loops = [in_a_loop(fn, jnp.array(POINT), 100) for fn in (mine, hand, peer)]
    times, compile_times = measure(loops, 100)
    report(capsys, f"cone IWELBO5, {PARTICLES} estimates", times, compile_times)
    assert_bars(times, compile_times)


# --- the auto-encoder of digits -----------------------------------------------------------------------------------

LATENT = 10


def vae_start():
    key_encoder, key_decoder = jr.split(jr.key(0))
    encoder = eqx.nn.MLP(64, 2 * LATENT, 128, 1, jax.nn.leaky_relu, key=key_encoder)
    return encoder, eqx.nn.MLP(LATENT, 64, 128, 1, jax.nn.leaky_relu, key=key_decoder)


def vae_model(decoder, counts):
    with numpyro.plate("image", counts.shape[0]):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=jax.vmap(decoder)(z)).to_event(1), obs=counts)


def vae_guide(encoder, counts):
    with numpyro.plate("image", counts.shape[0]):
        loc, log_scale = jnp.split(jax.vmap(encoder)(counts), 2, axis=-1)
        numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


def vae_ours(nets, counts, key):
    p, q = vi.program(vae_model)(nets[1], counts), vi.program(vae_guide)(nets[0], counts)
    return vi.E(lambda: vi.elbo(p, q))(key=key)


def vae_hand(nets, counts, key):
    loc, log_scale = jnp.split(jax.vmap(nets[0])(counts), 2, axis=-1)
    noise = jr.normal(key, loc.shape)
    z = loc + jnp.exp(log_scale) * noise
    logits = jax.vmap(nets[1])(z)
    log_p = jnp.sum(counts * logits - jax.nn.softplus(logits)) + jnp.sum(log_normal(z, 0.0, 0.0))
    return log_p - jnp.sum(log_normal(z, loc, log_scale))


def vae_numpyro(nets, counts, key):
    model = lambda: vae_model(nets[1], counts)
    guide = lambda: vae_guide(nets[0], counts)
    return -Trace_ELBO().loss(key, {}, model, guide)


def test_vae_step(capsys):
    counts = (jr.uniform(jr.key(5), (128, 64)) < 0.3).astype(jnp.float32)
    start, static = eqx.partition(vae_start(), eqx.is_array)

    def loop(fn):
        slope = jax.grad(lambda t, key: fn(eqx.combine(t, static), counts, key))
        return steps_of(slope, start, 50, 1e-9)

    times, compile_times = measure([loop(fn) for fn in (vae_ours, vae_hand, vae_numpyro)], 50, rounds=20)
    report(capsys, "digits VAE ELBO, batch of 128", times, compile_times)
    assert_bars(times, compile_times)


# --- enumeration --------------------------------------------------------------------------------------------------


def chain(t, length):
    """A chain of coins, every one enumerated: twice as many paths with each."""
    total, last = 0.0, 0
    for i in range(length):
        last = vi.sample(f"b{i}", dist.Bernoulli(jax.nn.sigmoid(t + last)), grad=vi.Enum())
        total = total + jnp.sin(i + 1.0) * last
    return total**2


def test_compile_time_grows_slowly_with_enumerated_sites(capsys):
    """At most like the square of the number of sites, though the number of paths is two to that power."""
    seconds = {}
    with without_compilation_cache():
        for length in (1, 2, 4, 8, 11):
            fn = jax.jit(jax.grad(lambda t, n=length: vi.E(lambda: chain(t, n))(key=jr.key(0))))
            begin = time.process_time()
            fn.lower(0.3).compile()
            seconds[length] = time.process_time() - begin
    with capsys.disabled():
        print("\ncompile time by enumerated sites: " + ", ".join(f"{n}: {s:.2f} s" for n, s in seconds.items()))
    assert seconds[8] <= 16 * seconds[2]
    assert seconds[11] <= (11 / 4) ** 2 * seconds[4]


# --- variance times time ------------------------------------------------------------------------------------------


def small(t):
    """One coin before a normal site, at a cost far from zero."""
    b = vi.sample("b", dist.Bernoulli(logits=t), grad=vi.Score())
    return (b + vi.sample("x", dist.Normal(t, 1.0)) - 0.5) ** 2 + 10.0


def wide(t):
    """Ten coins and a cost that couples neighbors: too many outcomes to enumerate in earnest."""
    b = vi.sample("b", dist.Bernoulli(logits=t + jnp.linspace(-1.0, 1.0, 10)), grad=vi.Score())
    return jnp.sum((b[1:] - 0.3) * (b[:-1] + 0.2)) + 2.0


def counted(t):
    """A count whose cost has a jump."""
    n = vi.sample("b", dist.Poisson(jnp.exp(t)), grad=vi.Score())
    return 3.0 + (n > 2) + 0.1 * n**2


# by program: the strategy that should win and by how much it must beat plain scores in variance times time
CASES = {
    "small": (small, "LocalExpectation", 3.0),
    "wide": (wide, "LocalExpectation", 3.0),
    "counted": (counted, "MVD", 3.0),
}


@pytest.mark.parametrize("name", CASES)
def test_variance_times_time_by_strategy(name, capsys):
    fn, chosen, factor = CASES[name]
    table = vi.variance_report(fn, jnp.array(0.2), key=jr.key(0), num_samples=1024)
    with capsys.disabled():
        print(f"\n{name}\n{table}")
    rows = {row.strategy: row for row in table.rows if row.site == "b"}
    assert rows[chosen].work < table.rows[0].work / factor
    if "Enum" in rows:
        assert rows["Enum"].variance <= table.rows[0].variance / factor
    assert "Give 'b'" in table.suggestion
