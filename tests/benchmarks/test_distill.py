"""A cycle of distillation beside the same cycle written by hand in JAX and in PyTorch, and the time to a known answer.

Run on a quiet machine, without the suite's run-time type checks:
`pytest tests/benchmarks/test_distill.py -m benchmark -s -n 0 -o addopts="--import-mode=importlib"`.
All sides are compiled before the clock starts; their runs alternate, and medians count.
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import numpyro.distributions as dist
import optax
import pytest

import genkit as gk


BATCH, CHUNK, CHUNKS, FAKE, LO, HI = 256, 50, 2, 5, 0.3, 5.0
STEPS = CHUNK * CHUNKS
ADAM, FOLLOW = optax.adam(1e-3), optax.adam(2e-3)
ANGLE = 2 * np.pi * np.arange(8) / 8


def parts():
    centers = 4 * jnp.stack([jnp.cos(ANGLE), jnp.sin(ANGLE)], 1)
    teacher = gk.diffusion.MixtureDenoiser(jnp.ones(8), centers, 0.16)
    student = eqx.nn.MLP(2, 2, 128, 2, jax.nn.silu, key=jr.key(0))
    fake = gk.diffusion.Preconditioned(gk.nn.MLP((2,), width=128, depth=2, key=jr.key(1)), sigma_data=3.0)
    return teacher, student, fake, gk.distill.Discriminator((2,), width=128, depth=2, sigma_data=3.0, key=jr.key(2))


class Student(eqx.Module):
    mlp: eqx.nn.MLP

    def __call__(self, z, cond=None):
        return self.mlp(z)


def by_genkit():
    teacher, student, fake, net = parts()
    recipe = gk.distill.recipe(
        teacher, Student(student), divergence=gk.divergence.JensenShannon(), ratio=gk.distill.DiscriminatorRatio(net),
        noise_distribution=dist.LogUniform(LO, HI), num_steps=STEPS, optimizer=ADAM, fake=fake, fake_optimizer=FOLLOW,
        fake_steps=FAKE, batch_size=BATCH, weight=jnp.square,
    )  # fmt: skip
    recipe = recipe.replace(log_every=CHUNK)
    return lambda: gk.fit(recipe, key=jr.key(3), progress=False).log["student/divergence"]


def by_hand():
    """The same cycle as one would write it for this model alone: the function to time."""
    teacher, student, fake, net = parts()
    arrays, rest = eqx.partition((student, (fake, net)), eqx.is_inexact_array)

    def levels(key):
        key_shift, key_order = jr.split(key)
        quantile = jnp.clip((jr.uniform(key_shift) + jnp.arange(BATCH) / BATCH) % 1, 2.0**-25, 1 - 2.0**-24)
        return LO * (HI / LO) ** jr.permutation(key_order, quantile)

    def draw(student, key):
        key_z, key_level, key_noise = jr.split(key, 3)
        x, sigma = jax.vmap(student)(jr.normal(key_z, (BATCH, 2))), levels(key_level)
        return x, sigma, x + sigma[:, None] * jr.normal(key_noise, x.shape)

    def critic_loss(critics, student, key):
        fake, net = eqx.combine(critics, rest[1])
        key_draw, key_real, key_noise = jr.split(key, 3)
        x, sigma, x_t = draw(student, key_draw)
        residual = jax.vmap(fake)(x_t, sigma) - x
        data = 3.0
        score = jnp.mean((1 / sigma**2 + 1 / data**2) * jnp.sum(residual**2, 1))
        real = teacher.sample(BATCH, key=key_real)
        real = real + sigma[:, None] * jr.normal(key_noise, real.shape)
        on_real, on_fake = jax.vmap(net)(real, sigma), jax.vmap(net)(x_t, sigma)
        return score + jnp.mean(jax.nn.softplus(-on_real)) + jnp.mean(jax.nn.softplus(on_fake))

    def student_loss(student, critics, key):
        fake, net = eqx.combine(critics, rest[1])
        x, sigma, x_t = draw(eqx.combine(student, rest[0]), key)
        x_t = jax.lax.stop_gradient(x_t)
        u = jax.vmap(net)(x_t, sigma)
        own = jax.vmap(fake)(x_t, sigma)
        gap = jax.vmap(teacher)(x_t, sigma) - own
        order = jnp.argsort(jnp.argsort(sigma)) * 10 // BATCH
        member = order == jnp.arange(10)[:, None]
        means = jax.nn.logsumexp(jnp.where(member, u, -jnp.inf), 1) - jnp.log(member.sum(1))
        u = jnp.clip(u - means[order], -30, 30)
        h = 2 * jax.nn.sigmoid(u)
        report = jnp.mean(sigma**2 * 2 * gk.divergence.JensenShannon().phi(u))
        return jnp.mean(jnp.sum(jax.lax.stop_gradient(-h[:, None] * gap) * x, 1)), report

    def cycle(carry, i):
        student, critics, opt_student, opt_critics = carry
        key = jr.fold_in(jr.key(3), i)

        def follow(carry, j):
            critics, opt = carry
            slope = jax.grad(critic_loss)(critics, eqx.combine(student, rest[0]), jr.fold_in(key, j))
            updates, opt = FOLLOW.update(slope, opt, critics)
            return (optax.apply_updates(critics, updates), opt), None

        (critics, opt_critics), _ = jax.lax.scan(follow, (critics, opt_critics), jnp.arange(FAKE))
        slope, report = jax.grad(student_loss, has_aux=True)(student, critics, jr.fold_in(key, FAKE))
        updates, opt_student = ADAM.update(slope, opt_student, student)
        return (optax.apply_updates(student, updates), critics, opt_student, opt_critics), report

    chunk = jax.jit(lambda carry, i: jax.lax.scan(cycle, carry, i), donate_argnums=0)

    def run():
        carry = jax.tree.map(jnp.copy, (*arrays, ADAM.init(arrays[0]), FOLLOW.init(arrays[1])))
        reports = []
        for i in range(CHUNKS):
            carry, values = chunk(carry, jnp.arange(CHUNK) + i * CHUNK)
            reports.append(np.asarray(values))
        return np.concatenate(reports)

    return run


def alternate(sides, repeats):
    """What each side ends at, and the median of its times per cycle [ms]; the first run of each compiles."""
    final = {name: float(np.mean(run()[-CHUNK:])) for name, run in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start) / STEPS)
    return final, {name: float(np.median(values)) for name, values in times.items()}


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_a_cycle_costs_what_it_costs_by_hand():
    final, times = alternate({"by hand": by_hand(), "genkit": by_genkit()}, 7)
    ratio = times["genkit"] / times["by hand"]
    print(f"\ncycle [ms]: {times}, ratio {ratio:.3f}; divergence at the end: {final}")
    assert final["genkit"] == pytest.approx(final["by hand"], rel=0.3)  # the same work; the draws differ
    assert ratio <= 1.05


def shaken(tree, key):
    """A network whose layers that begin at zero do not: otherwise any two agree."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jr.split(key, len(leaves))
    shake = lambda x, k: x + 0.1 * jr.normal(k, x.shape) if eqx.is_inexact_array(x) and x.ndim else x
    return jax.tree.unflatten(structure, [shake(x, k) for x, k in zip(leaves, keys, strict=True)])


def in_torch(compiled, *, shake=False):
    from benchmarks import distill_torch

    teacher, student, fake, net = parts()
    if shake:
        fake, net = shaken(fake, jr.key(4)), shaken(net, jr.key(5))
    cycle = distill_torch.Cycle(
        teacher, student, fake, net, batch=BATCH, fake_steps=FAKE, levels=(LO, HI), compiled=compiled
    )
    return cycle, distill_torch.difference(cycle, teacher, student, fake, net)


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_the_torch_networks_are_the_same():
    pytest.importorskip("torch")
    assert in_torch(False, shake=True)[1] < 1e-4


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch.compile itself
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_cycle_beside_torch(compiled):
    pytest.importorskip("torch")
    from benchmarks import distill_torch

    genkit, times = by_genkit(), {}
    genkit()
    for threads in (1, 2):
        with distill_torch.threads(threads):
            cycle, _ = in_torch(compiled)
            theirs = cycle.run(STEPS)
            for _ in range(3):
                start = time.perf_counter()
                cycle.run(CHUNK)
                times.setdefault(f"torch, {threads}", []).append(1e3 * (time.perf_counter() - start) / CHUNK)
                start = time.perf_counter()
                ours = genkit()
                times.setdefault("genkit", []).append(1e3 * (time.perf_counter() - start) / STEPS)
    times = {name: float(np.median(values)) for name, values in times.items()}
    fastest = min(value for name, value in times.items() if name != "genkit")
    ends = np.mean(theirs[-CHUNK:]), np.mean(ours[-CHUNK:])
    print(f"\ncycle [ms]: {times}; divergence in the end, theirs and ours: {ends[0]:.3f}, {ends[1]:.3f}; torch takes "
          f"{fastest / times['genkit']:.1f} times as long")  # fmt: skip
    assert ends[0] == pytest.approx(ends[1], rel=0.3)
    assert times["genkit"] < fastest


@pytest.mark.benchmark
@pytest.mark.timeout(1800)
def test_time_to_two_digits_on_a_mixture():
    class Gaussian(eqx.Module):
        mean: jax.Array
        log_std: jax.Array

        def __call__(self, z, cond=None):
            return self.mean + jnp.exp(self.log_std) * z

        def denoiser(self):
            return gk.diffusion.GaussianDenoiser(self.mean, jnp.exp(2 * self.log_std))

    teacher = gk.diffusion.MixtureDenoiser(jnp.array([0.7, 0.3]), jnp.array([[-1.0], [1.5]]), jnp.array([0.49, 0.81]))
    student = Gaussian(jnp.zeros(1), jnp.full(1, np.log(1.5)))
    for seed in range(2):  # the second run is compiled already
        start = time.perf_counter()
        made = gk.distill.distill(
            teacher, student, divergence=gk.divergence.JensenShannon(), ratio=gk.distill.ExactRatio(),
            noise_distribution=dist.Delta(0.0), num_steps=500, batch_size=512, ema=0.97, key=jr.key(seed),
        )  # fmt: skip
        seconds = time.perf_counter() - start
        error = max(abs(float(made.ema.mean[0]) + 0.2358), abs(float(jnp.exp(made.ema.log_std[0])) - 1.3487))
        print(f"\nmixture B, Jensen-Shannon: error {error:.4f} after {seconds:.2f} s")
        assert error < 0.02
