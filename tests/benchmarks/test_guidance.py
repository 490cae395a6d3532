"""What guidance costs beyond its evaluations, and what skipping saves on the clock.

Run by hand, without the run-time type checks of the suite, one test at a time on a quiet machine:
`python -m pytest tests/benchmarks/test_guidance.py -m benchmark -n 0 -s -o addopts=--import-mode=importlib -k saves`.
The comparison with the guiders of diffusers runs where torch and diffusers are installed.
"""

import itertools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from timing import compare, medians

import genkit as gk


pytestmark = pytest.mark.benchmark
gd, gg = gk.diffusion, gk.guidance
DIM = 64


class Network(eqx.Module):
    """A perceptron heavy enough that its evaluations decide; prefers the mean of its label."""

    layers: tuple

    def __init__(self, width, depth):
        sizes = [DIM, *[width] * depth, DIM]
        keys = jr.split(jr.key(0), len(sizes) - 1)
        self.layers = tuple(eqx.nn.Linear(i, o, key=k) for i, o, k in zip(sizes[:-1], sizes[1:], keys, strict=True))

    def __call__(self, x, sigma, cond=None):
        label = jnp.asarray(-1 if cond is None else cond)
        mean = jnp.where(label < 0, 0.0, jnp.sin(jnp.arange(DIM) * (1.0 + label)))
        # The label enters below too: a network blind to it would be evaluated once for both conditions.
        h = (x + mean) / jnp.sqrt(1 + sigma**2)
        for layer in self.layers[:-1]:
            h = jax.nn.silu(layer(h))
        exact = mean + (x - mean) * 0.25 / (0.25 + sigma**2)
        return exact + 1e-3 * self.layers[-1](h)


def sampler_run(network, table, guidance, n, skip="dynamic"):
    sampler = gk.Sampler(table, guidance, skip=skip)
    cond = jnp.arange(n) % 4
    return lambda: gk.sample(sampler, network, n, cond=cond, shape=(DIM,), key=jr.key(1)).value


def test_a_guided_step_costs_its_passes():
    # Passes of 20 ms or more: two passes of the bare network in a scan, one after the other, against one guided step.
    n, network = 384, Network(1536, 4)
    table = gd.ddim(gd.karras(6, 0.01, 10.0))
    cond = jnp.arange(n) % 4

    @eqx.filter_jit
    def passes(network, x):
        def two(x, sigma):
            x = jax.vmap(lambda y, c: network(y, sigma, c))(x, cond)
            return jax.vmap(lambda y: network(y, sigma))(x), None

        return jax.lax.scan(two, x, jnp.asarray(table.sigma, x.dtype))[0]

    x = jr.normal(jr.key(0), (n, DIM))
    alone = lambda: passes(network, x)
    ratios = []
    for name, guidance in {
        "cfg": gg.cfg(3.0),
        "apg": gg.apg(3.0, norm_rms=0.3, momentum=-0.5),
        "sum": gg.rescale(gg.cfg(2.0) + gg.apg(2.0), 0.5),
    }.items():
        guided, bare, ratio = compare(sampler_run(network, table, guidance, n), alone, 20)
        print(f"{name:5s} {1e3 * guided / 12:6.2f} ms per pass, {1e3 * bare / 12:6.2f} alone, ratio {ratio:.3f}")
        assert bare / 12 > 0.02, "the passes are too light to judge by"
        ratios.append(ratio)
    assert max(ratios) <= 1.05


def test_calls_in_the_compiled_program():
    # One product per layer and distinct evaluation: equal slots of a sum are merged, nothing is evaluated twice.
    network, n = Network(96, 2), 8
    table = gd.ddim(gd.karras(6, 0.01, 10.0))
    guidance = gg.cfg(2.0) + gg.apg(2.0) + gg.negative(1.5, 2) + gg.perpneg(1.2, 2)
    call = {"cond": jnp.arange(n) % 4, "x_init": None, "shape": (DIM,)}
    keys = jr.split(jr.key(0), n)
    text = str(jax.make_jaxpr(lambda: gk.Sampler(table, guidance).draw(network, keys, **call).value)())
    assert len(re.findall(r"dot_general", text)) == 3 * 3


def test_adaptive_guidance_saves_time():
    n, network = 320, Network(1024, 4)
    table = gd.ddim(gd.karras(32, 0.002, 80.0))
    guided = gk.sample(table, network, n, cond=jnp.arange(n) % 4, shape=(DIM,), key=jr.key(1), guidance=gg.cfg(3.0))
    gated = gk.Sampler(table, gg.adaptive(gg.cfg(3.0), 0.99), skip="compact")
    draws = gk.sample(gated, network, n, cond=jnp.arange(n) % 4, shape=(DIM,), key=jr.key(1))
    saved = 1 - float(draws.nfe.sum()) / float(guided.nfe.sum())
    runs = {"full": sampler_run(network, table, gg.cfg(3.0), n)}
    runs["short"] = sampler_run(network, table, gg.adaptive(gg.cfg(3.0), 0.99), n, "compact")
    full, short = medians(runs, 7).values()
    gain = 1 - short / full
    print(f"{1e3 * full / 64:.1f} ms per pass; evaluations saved {saved:.3f}, time saved {gain:.3f}")
    assert full / 64 > 0.005 and saved > 0.1
    assert gain >= 0.8 * saved


def torch_network(network):
    """The same network and weights in torch, on a batch; the null condition is label -1."""
    torch = pytest.importorskip("torch")
    layers = [[torch.from_numpy(np.array(leaf)) for leaf in (one.weight, one.bias)] for one in network.layers]

    def denoise(x, sigma, cond):
        mean = torch.sin(torch.arange(DIM) * (1.0 + cond[:, None])) * (cond[:, None] >= 0)
        h = (x + mean) / (1 + sigma**2) ** 0.5
        for weight, bias in layers[:-1]:
            h = torch.nn.functional.silu(torch.nn.functional.linear(h, weight, bias))
        exact = mean + (x - mean) * 0.25 / (0.25 + sigma**2)
        return exact + 1e-3 * torch.nn.functional.linear(h, *layers[-1])

    return denoise


def eager_draw(guider, denoise, levels, start, cond):
    """DDIM in eager torch with a guider of diffusers, which combines the predictions it asks for."""
    torch = pytest.importorskip("torch")
    x, null = torch.from_numpy(start), torch.full((len(start),), -1)
    with torch.inference_mode():
        for i, (s, t) in enumerate(itertools.pairwise(map(float, levels))):
            guider.set_state(step=i, num_inference_steps=len(levels) - 1, timestep=torch.tensor(s))
            preds = [denoise(x, s, cond)]
            if guider.num_conditions > 1:
                preds.append(denoise(x, s, null))
            x0 = guider.forward(*preds).pred
            x = x0 + t / s * (x - x0)
    return x.numpy()


@pytest.mark.parametrize(("n", "width", "depth", "bar"), [(64, 256, 2, 1.0), (128, 1024, 4, np.inf)])
@pytest.mark.parametrize("method", ["cfg", "apg"])
def test_against_the_guiders_of_diffusers(method, n, width, depth, bar):
    # On the heavy network both wait for the matrix products of their libraries, so that its ratio is only printed; on
    # the light one guidance itself shows.
    torch, guiders = pytest.importorskip("torch"), pytest.importorskip("diffusers.guiders")
    network = Network(width, depth)
    levels = gd.karras(10, 0.01, 10.0)
    table, cond = gd.ddim(levels), np.arange(n) % 4
    start = 10 * np.asarray(jr.normal(jr.key(2), (n, DIM)))
    theirs = {
        "cfg": lambda: guiders.ClassifierFreeGuidance(guidance_scale=3.0),
        "apg": lambda: guiders.AdaptiveProjectedGuidance(
            guidance_scale=2.0,  # in its original formulation a scale of 0 is off
            adaptive_projected_guidance_momentum=None,
            adaptive_projected_guidance_rescale=5.0,
            eta=0.0,
            use_original_formulation=True,
        ),
    }[method]
    ours = {"cfg": gg.cfg(3.0), "apg": gg.apg(3.0, norm_threshold=5.0)}[method]
    run = lambda: gk.sample(table, network, n, cond=cond, x_init=start, guidance=ours, key=jr.key(1))
    denoise, labels = torch_network(network), torch.from_numpy(cond)
    eager = lambda: eager_draw(theirs(), denoise, levels, start, labels)
    fastest = None
    for threads in (1, 2):
        torch.set_num_threads(threads)
        (elapsed,) = medians({"eager": eager}, 3).values()
        fastest = (elapsed, threads) if fastest is None or elapsed < fastest[0] else fastest
    torch.set_num_threads(fastest[1])
    passes = int(run().nfe[0])
    mine, other = medians({"genkit": lambda: run().value, "diffusers": eager}, 25).values()
    print(
        f"{method}, {width} x {depth} at {n}: {1e3 * mine / passes:.2f} ms per pass, diffusers "
        f"{1e3 * other / passes:.2f} ms ({fastest[1]} threads), {passes} passes, ratio {mine / other:.2f}"
    )
    np.testing.assert_allclose(run().value, eager(), rtol=1e-3, atol=1e-3)
    assert mine <= bar * other


def test_phases_beside_branches_on_a_light_network():
    # Where a pass is so light that a branch per step could matter: the loop without one, beside the one with.
    n, network = 16, Network(32, 2)
    table = gd.ddim(gd.karras(64, 0.002, 80.0))
    guidance = gg.step_adaptive(gg.cfg(3.0), 16)
    runs = {skip: sampler_run(network, table, guidance, n, skip) for skip in ("dynamic", "phases", "static")}
    times = medians(runs, 21)
    for skip, elapsed in times.items():
        print(f"{skip:8s} {1e6 * elapsed / 80:7.1f} us per pass")
    assert times["phases"] <= 1.25 * times["dynamic"]
