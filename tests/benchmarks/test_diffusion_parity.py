"""Samplers draw by draw against k-diffusion and diffusers: the same start, the same noise, the same grid.

Run with `pytest tests/benchmarks/test_diffusion_parity.py -m benchmark -s -n 0` in an environment that has the peers;
without them everything is skipped. k-diffusion runs its plain loops in float64, and differences are relative to the
largest value; diffusers runs its schedulers in float32 from noise level 15, and differences are absolute.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array
from peers import k_diffusion_sampling

import genkit as gk


pytestmark = [pytest.mark.benchmark, pytest.mark.filterwarnings("ignore")]  # peers warn
gd = gk.diffusion
N, DIM = 3, 5
GRID = gd.karras(12, 0.03, 15.0)
OPEN = gd.karras(13, 0.03, 15.0, final=None)  # ends above zero: some peers extrapolate into a last step to zero
UNEVEN = np.array([15.0, 11.0, 10.0, 6.0, 3.5, 3.0, 1.2, 1.0, 0.5, 0.2, 0.15, 0.08, 0.04])
START = 15.0 * np.random.default_rng(0).normal(size=(N, DIM))
NOISE = np.random.default_rng(1).normal(size=(64, N, DIM))


def denoise(x, sigma, tanh):
    """Not linear, so that a wrong order of operations shows."""
    return tanh(x / (1 + sigma**2)) - 0.3 * x / (2 + sigma**2)


class Model(gk.Denoiser):
    """The same in JAX."""

    @property
    def shape(self):
        return (DIM,)

    def __call__(self, x, sigma, cond=None):
        return denoise(x, sigma, jnp.tanh)


class Given(eqx.Module):
    """Noise given in advance, one array for each row."""

    values: Array

    def __call__(self, keys: Any, row: Any, stream: int, x: Array) -> Array:
        del keys, stream
        return self.values[row.row].astype(x.dtype)


def ours(table: gk.Table, start: np.ndarray) -> np.ndarray:
    """Our draws, the i-th row that adds noise taking the i-th array of `NOISE`."""
    order = np.maximum(np.cumsum((table.c != 0) | (table.c_stage != 0)) - 1, 0)
    noise = Given(jnp.asarray(NOISE[order], jnp.result_type(float)))
    start = jnp.asarray(start, jnp.result_type(float))
    return np.asarray(gk.sample(gk.Sampler(table, noise=noise), Model(), N, key=jr.key(0), x_init=start).value)


# k-diffusion: plain loops in float64.

K_TABLES: dict[str, Callable[[np.ndarray], gk.Table]] = {
    "sample_euler": gd.ddim,
    "sample_euler_ancestral": gd.ancestral,
    "sample_heun": gd.heun,
    "sample_heun, churn": lambda g: gd.heun(g, (5.0, 0.0, 100.0, 1.01)),
    "sample_dpm_2": gd.dpm_solver,
    "sample_lms": gd.lms,
    "sample_dpmpp_2s_ancestral, eta 0": lambda g: gd.dpm_solver(g, 2, "x0"),
    "sample_dpmpp_2m": gd.dpmpp,
    "sample_dpmpp_2m_sde, midpoint": lambda g: gd.dpmpp(g, 2, stochastic=True),
    "sample_dpmpp_2m_sde, heun": lambda g: gd.sa(g, 2, 1.0, corrector=False),
    "sample_dpmpp_3m_sde": lambda g: gd.dpmpp(g, 3, stochastic=True),
    "DPMSolver.dpm_solver_2_step": gd.dpm_solver,
    "DPMSolver.dpm_solver_3_step": lambda g: gd.dpm_solver(g, 3),
}
K_OPTIONS = {
    "sample_heun, churn": {"s_churn": 5.0, "s_tmax": 100.0, "s_noise": 1.01},
    "sample_dpmpp_2s_ancestral, eta 0": {"eta": 0.0},
    "sample_dpmpp_2m_sde, midpoint": {"solver_type": "midpoint"},
    "sample_dpmpp_2m_sde, heun": {"solver_type": "heun"},
}


def k_diffusion(name: str, grid: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The peer's draws from `START`."""
    sampling = k_diffusion_sampling()
    import torch

    model = lambda x, sigma, **kwargs: denoise(x, sigma[:, None], torch.tanh)
    noises = iter(torch.tensor(NOISE))
    levels, x = torch.tensor(grid), torch.tensor(START)
    if name.startswith("DPMSolver"):
        step = getattr(sampling.DPMSolver(model), name.split(".")[1])
        for t, after in zip(-levels[:-1].log(), -levels[1:].log(), strict=True):
            x = step(x, t, after)[0]
        return x.numpy()
    options = K_OPTIONS.get(name, {})
    if "ancestral" in name or "sde" in name:
        options = options | {"noise_sampler": lambda sigma, after: next(noises)}
    monkeypatch.setattr(torch, "randn_like", lambda x: next(noises))
    return getattr(sampling, name.split(",")[0])(model, x, levels, disable=True, **options).numpy()


@pytest.mark.parametrize("grid", [GRID, OPEN, UNEVEN], ids=["karras to zero", "karras", "uneven"])
@pytest.mark.parametrize("name", K_TABLES)
def test_parity_with_k_diffusion(name, grid, monkeypatch):
    if grid is GRID and ("lms" in name or "DPMSolver" in name):
        pytest.skip("the peer has no first-order last step")
    peer = k_diffusion(name, grid, monkeypatch)
    with jax.enable_x64(True):
        found = ours(K_TABLES[name](grid), START)
    gap = np.abs(found - peer).max() / np.abs(peer).max()
    print(f"\nk-diffusion {name}: relative difference {gap:.1e}")
    assert gap < 1e-5


# diffusers: schedulers in float32. Their own grids are laid aside: the levels are set to ours.


def vp_state(x, s):
    return x / np.sqrt(1 + s**2)


def run(scheduler: Any, grid: np.ndarray, coordinates: str, output: Callable, **options: Any) -> np.ndarray:
    """A scheduler from `START` down the grid.

    `coordinates` are those of its state, `"ve"` or `"vp"`; `output(x, x0, sigma)` is what its network predicts, from
    the state and the clean data.
    """
    import torch

    scheduler.set_timesteps(len(grid) - 1)
    if hasattr(scheduler, "alphas_cumprod") and not hasattr(scheduler, "set_begin_index"):
        # Schedulers that know times only: their times are made the levels.
        scheduler.alphas_cumprod = torch.tensor(1 / (1 + grid[-2::-1] ** 2))
        scheduler.timesteps = torch.arange(len(grid) - 2, -1, -1)
        scheduler.num_inference_steps = scheduler.config.num_train_timesteps
        levels = grid[:-1]
    else:
        twice = type(scheduler).__name__.startswith("Heun")
        levels = np.concatenate([grid[:1], np.repeat(grid[1:-1], 2), grid[-1:]]) if twice else grid
        scheduler.sigmas = torch.tensor(levels)
        scheduler.set_begin_index(0)
    norm = (lambda s: np.sqrt(1 + s**2)) if coordinates == "vp" else (lambda s: 1.0)
    x = torch.tensor(START / norm(grid[0]), dtype=torch.float32)
    noises = iter(torch.tensor(NOISE, dtype=torch.float32))
    for s, t in zip(levels, scheduler.timesteps, strict=False):
        x0 = denoise(x * norm(s), s, torch.tanh)
        fresh = {name: next(noises) for name, value in options.items() if value is next}
        fixed = {name: value for name, value in options.items() if value is not next}
        x = scheduler.step(output(x, x0, s).float(), t, x, return_dict=False, **fixed, **fresh)[0]
    return x.numpy() * norm(grid[-1])


def noise_of(coordinates):
    """The noise in the state, as networks that predict it do."""
    if coordinates == "ve":
        return lambda x, x0, s: (x - x0) / s
    return lambda x, x0, s: (x * np.sqrt(1 + s**2) - x0) / s


def network_of(x, x0, s):
    """The output of a network under EDM's preconditioning with deviation 1/2."""
    total = s**2 + 0.25
    return (x0 - 0.25 / total * x) * np.sqrt(total) / (s * 0.5)


def velocity_of(x, x0, s):
    """`v` in variance-preserving coordinates."""
    scale = np.sqrt(1 + s**2)
    return (x * scale - x0) / s / scale - s / scale * x0


# Left out: the third-order stochastic update of `DPMSolverMultistepScheduler` (0.42). The weight it gives the second
# difference of the predictions tends to -1 for small steps, where it must vanish: a sign. Corrected, the update is
# that of `sample_dpmpp_3m_sde` and ours. And `SASolverScheduler`, which adds a term of its own to all coefficients of
# second order, those of its start among them ("only for few steps"); ours are the paper's.
MULTI = {"lower_order_final": False, "final_sigmas_type": "zero"}
SDE = {"algorithm_type": "sde-dpmsolver++", **MULTI}
D_CASES: dict[str, tuple[str, dict, str, Any, dict, np.ndarray, Callable]] = {
    # name: class, its settings, coordinates, output of the network, options of a step, grid, our table
    "Euler": ("EulerDiscreteScheduler", {}, "ve", None, {}, GRID, gd.ddim),
    "EulerAncestral": ("EulerAncestralDiscreteScheduler", {}, "ve", None, {}, GRID, gd.ancestral),
    "Heun": ("HeunDiscreteScheduler", {}, "ve", None, {}, GRID, gd.heun),
    "LMS": ("LMSDiscreteScheduler", {}, "ve", None, {}, OPEN, gd.lms),
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, "vp", None, {}, GRID, gd.ddim),
    "DDIM, eta 0.6": (
        "DDIMScheduler", {"clip_sample": False}, "vp", None, {"eta": 0.6, "variance_noise": next}, GRID,
        lambda g: gd.ddim(g, 0.6),
    ),
    "DDPM": ("DDPMScheduler", {"clip_sample": False}, "vp", None, {}, GRID, gd.ancestral),
    "DPM++ 1": ("DPMSolverMultistepScheduler", {"solver_order": 1, **MULTI}, "vp", None, {}, GRID, gd.ddim),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"solver_order": 2, **MULTI}, "vp", None, {}, GRID, gd.dpmpp),
    "DPM++ 3M": (
        "DPMSolverMultistepScheduler", {"solver_order": 3, **MULTI}, "vp", None, {}, GRID, lambda g: gd.dpmpp(g, 3),
    ),
    "DPM++ 2M SDE": (
        "DPMSolverMultistepScheduler", {"solver_order": 2, **SDE}, "vp", None, {"variance_noise": next}, GRID,
        lambda g: gd.dpmpp(g, 2, True),
    ),
    "DPM++ 2M SDE, heun": (
        "DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun", **SDE}, "vp", None,
        {"variance_noise": next}, GRID, lambda g: gd.sa(g, 2, 1.0, False),
    ),
    "UniPC 1": (
        "UniPCMultistepScheduler", {"solver_order": 1, **MULTI}, "vp", None, {}, OPEN, lambda g: gd.unipc(g, 1),
    ),
    "UniPC 2": (
        "UniPCMultistepScheduler", {"solver_order": 2, **MULTI}, "vp", None, {}, OPEN, lambda g: gd.unipc(g, 2),
    ),
    "UniPC 3": ("UniPCMultistepScheduler", {"solver_order": 3, **MULTI}, "vp", None, {}, OPEN, gd.unipc),
    "DEIS 2": (
        "DEISMultistepScheduler", {"solver_order": 2, "lower_order_final": False}, "vp", None, {}, OPEN,
        lambda g: gd.deis(g, 2),
    ),
    "DEIS 3": (
        "DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "vp", None, {}, OPEN, gd.deis,
    ),
    "EDM Euler": ("EDMEulerScheduler", {}, "ve", network_of, {}, GRID, gd.ddim),
    "EDM DPM++ 2M": ("EDMDPMSolverMultistepScheduler", {"solver_order": 2}, "ve", network_of, {}, GRID, gd.dpmpp),
    "EDM DPM++ 3M": (
        "EDMDPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, "ve", network_of, {}, GRID,
        lambda g: gd.dpmpp(g, 3),
    ),
}  # fmt: skip


def scheduler_of(name: str, settings: dict, grid: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler whose own noise is `NOISE`."""
    torch = pytest.importorskip("torch")
    schedulers = pytest.importorskip("diffusers.schedulers")
    make = getattr(schedulers, name)
    noises = iter(torch.tensor(NOISE, dtype=torch.float32))
    module = __import__("sys").modules[make.__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(noises))
    if name in ("DDIMScheduler", "DDPMScheduler"):
        settings = settings | {"num_train_timesteps": len(grid) - 1}
    return make(**settings)


def compare(name: str, found: np.ndarray, peer: np.ndarray) -> None:
    gap = float(np.abs(found - peer).max())
    print(f"\ndiffusers {name}: absolute difference {gap:.1e}")
    assert gap < 3e-4


@pytest.mark.parametrize("name", D_CASES)
def test_parity_with_diffusers(name, monkeypatch):
    kind, settings, coordinates, output, options, grid, make = D_CASES[name]
    scheduler = scheduler_of(kind, settings, grid, monkeypatch)
    peer = run(scheduler, grid, coordinates, output or noise_of(coordinates), **options)
    compare(name, ours(make(grid), START), peer)


def test_parity_with_the_single_step_scheduler(monkeypatch):
    # Its inner evaluations are nodes of its grid: halfway in log sigma where the grid is log-uniform.
    settings = {"solver_order": 2, "lower_order_final": False, "final_sigmas_type": "sigma_min"}
    fine = gd.log_uniform(13, 0.03, 15.0, final=None)
    scheduler = scheduler_of("DPMSolverSinglestepScheduler", settings, fine, monkeypatch)
    peer = run(scheduler, fine, "vp", noise_of("vp"))
    compare("DPM++ 2S", ours(gd.dpm_solver(fine[::2], 2, "x0"), START), peer)


def test_parity_with_ipndm(monkeypatch):
    # The peer takes the weights of a uniform grid on any grid.
    settings = {"trained_betas": (OPEN / np.sqrt(1 + OPEN**2)).tolist()}
    scheduler = scheduler_of("IPNDMScheduler", settings, OPEN, monkeypatch)
    scheduler.set_timesteps(len(OPEN) - 1)
    torch = pytest.importorskip("torch")
    x = torch.tensor(vp_state(START, OPEN[0]), dtype=torch.float32)
    for s, t in zip(OPEN[:-1], scheduler.timesteps, strict=True):
        x0 = denoise(x * np.sqrt(1 + s**2), s, torch.tanh)
        x = scheduler.step(velocity_of(x, x0, s).float(), t, x, return_dict=False)[0]
    peer = x.numpy() * np.sqrt(1 + OPEN[-1] ** 2)
    compare("IPNDM", ours(gd.ipndm(OPEN, uniform=True), START), peer)


def test_parity_with_euler_on_straight_paths(monkeypatch):
    scheduler = scheduler_of("FlowMatchEulerDiscreteScheduler", {}, OPEN, monkeypatch)
    torch = pytest.importorskip("torch")
    times = OPEN / (1 + OPEN)
    scheduler.set_timesteps(len(OPEN) - 1)
    scheduler.sigmas = torch.tensor(times)
    scheduler.set_begin_index(0)
    x = torch.tensor(START * (1 - times[0]), dtype=torch.float32)
    for u, s, t in zip(times[:-1], OPEN[:-1], scheduler.timesteps, strict=True):
        x0 = denoise(x / (1 - u), s, torch.tanh)
        x = scheduler.step(((x - x0) / u).float(), t, x, return_dict=False)[0]
    compare("FlowMatchEuler", ours(gd.velocity_ab(OPEN, 1), START), x.numpy() / (1 - times[-1]))


def test_parity_of_the_predictor_corrector(monkeypatch):
    torch = pytest.importorskip("torch")
    schedulers = pytest.importorskip("diffusers.schedulers")
    # The peer corrects before it predicts: its two steps are called in our order.
    keys = [jr.fold_in(jr.fold_in(jr.key(0), i), 1) for i in range(N)]

    def drawn(row, stream):
        one = lambda key: jr.normal(jr.fold_in(jr.fold_in(key, row), stream), (DIM,), jnp.float32)
        return torch.tensor(np.stack([one(key) for key in keys]))

    queue = iter([drawn(i, k) for i in range(len(OPEN) - 1) for k in range(2)])
    module = __import__("sys").modules[schedulers.ScoreSdeVeScheduler.__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(queue))
    scheduler = schedulers.ScoreSdeVeScheduler(snr=0.16)
    scheduler.set_timesteps(len(OPEN))
    scheduler.discrete_sigmas = torch.tensor(OPEN[::-1].copy())
    score = lambda x, s: ((denoise(x, s, torch.tanh) - x) / s**2).float()
    x = torch.tensor(START, dtype=torch.float32)
    for i in range(len(OPEN) - 1):
        place = torch.tensor((len(OPEN) - 1 - i + 0.01) / (len(OPEN) - 1))
        x = scheduler.step_pred(score(x, OPEN[i]), place, x).prev_sample.float()
        x = scheduler.step_correct(score(x, OPEN[i + 1]), x).prev_sample.float()
    sampler = gd.predictor_corrector(OPEN, 0.16, 1, norm="batch")
    start = jnp.asarray(START, jnp.float32)
    found = gk.sample(sampler, Model(), N, key=jr.key(0), x_init=start).value
    compare("ScoreSdeVe, prediction and correction", np.asarray(found), x.numpy())
