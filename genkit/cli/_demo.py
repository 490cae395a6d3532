"""`genkit demo`: train on real digits, draw with guidance, judge, save pictures and figures."""

import json
import time
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np

from genkit import divergence
from genkit.cli._zoo import zoo_file
from genkit.data import Digits, digits
from genkit.diffusion import heun, karras
from genkit.io import load, plot_grid, plot_log, save_draws
from genkit.sampling import AbstractSampler, Draws, Sampler, sample
from genkit.storage import atomic_write, is_run
from genkit.training import Fitted, fit


NUM_JUDGED = 1000
"""Draws of each kind that are judged."""

# Fresh noise at intermediate levels widens the spread of the draws a little: without it recall is lower.
CHURN = (10.0, 0.02, 50.0, 1.0)


def run(args: Namespace) -> int:
    """Run the demo: train or re-use the run in `args.out`, draw, judge, save.

    Args:
        args: has `out` (folder), `seed` (int) and `steps` (int or `None` for as many as the recipe says).

    Returns:
        Exit status 0.
    """
    out = Path(args.out)
    start = time.perf_counter()
    print("genkit demo: a diffusion model of handwritten digits, trained, sampled with guidance, and judged\n")
    fitted = _train(out, args.seed, args.steps)
    data = digits()
    labels = np.arange(NUM_JUDGED) % 10
    key_guided, key_free = jax.random.split(jax.random.key(args.seed + 1))
    guided_sampler = load(zoo_file("samplers/heun_cfg.py"))
    free_sampler = Sampler(heun(karras(18, 0.002, 80.0), churn=CHURN))
    guided = _draw("guided", guided_sampler, fitted, labels, key_guided)
    free = _draw("unguided", free_sampler, fitted, labels, key_free)

    report = judge(np.asarray(guided.value), np.asarray(free.value), labels, data)
    report["evaluations per guided draw"] = float(np.mean(guided.nfe))
    report["evaluations per unguided draw"] = float(np.mean(free.nfe))
    save_draws(out / "guided.npz", guided)
    plot_grid(out / "digits.png", _by_class(np.asarray(guided.value), labels), columns=10)
    plot_log(out / "loss.png", fitted.log)
    atomic_write(out / "report.json", json.dumps(report, indent=2))
    _print_report(report)
    print(f"\npicture {out / 'digits.png'}, figures {out / 'report.json'}, in {time.perf_counter() - start:.0f} s")
    return 0


def judge(guided: np.ndarray, free: np.ndarray, labels: np.ndarray, data: Digits) -> dict[str, float]:
    """Compare draws with the held-out digits, and put beside each figure what real digits give.

    Args:
        guided: guided draws, shape `(n, 1, 8, 8)`.
        free: unguided draws, shape `(n, 1, 8, 8)`.
        labels: the labels both were drawn under, shape `(n,)`.
        data: the digits and their split.

    Returns:
        Figures by name.
    """
    from sklearn.svm import SVC  # takes about a second to import

    def flat(x: np.ndarray) -> np.ndarray:
        return np.asarray(x, np.float32).reshape(len(x), -1)

    guided = flat(guided)
    free = flat(free)
    train = flat(data.x_train)
    test = flat(data.x_test)
    classifier = SVC(gamma=0.02, C=10.0).fit(train, data.y_train)
    # Neighborhood radii depend on the sample size: compare equal sizes, averaged over disjoint blocks.
    size = len(test)
    blocks = [free[i : i + size] for i in range(0, len(free) - size + 1, size)]
    precision, recall = np.mean([divergence.precision_recall(test, block, k=3) for block in blocks], axis=0)
    # The digits stand in the order of their writers: a random part, not the first.
    part = train[np.random.default_rng(0).permutation(len(train))[:size]]
    real_precision, real_recall = divergence.precision_recall(test, part, k=3)
    return {
        "class accuracy, guided": float(classifier.score(guided, labels)),
        "class accuracy, held-out digits": float(classifier.score(test, data.y_test)),
        "energy distance to held-out, unguided": float(divergence.energy_distance(free, test)),
        "energy distance to held-out, training digits": float(divergence.energy_distance(train, test)),
        "precision, unguided": float(precision),
        "precision, training digits": float(real_precision),
        "recall, unguided": float(recall),
        "recall, training digits": float(real_recall),
        "nearest-training-image distance over that of held-out, unguided": float(
            divergence.nearest_distance_ratio(free, train, test)
        ),
        "nearest-training-image distance over that of held-out, guided": float(
            divergence.nearest_distance_ratio(guided, train, test)
        ),
    }


def _train(out: Path, seed: int, steps: int | None) -> Fitted:
    """The digits model: trained, resumed, or found complete in `out`."""
    start = time.perf_counter()
    recipe = load(zoo_file("models/digits.py"))
    reused = is_run(out)
    fitted = fit(recipe, key=jax.random.key(seed), num_steps=steps, run=out, resume=reused)
    verb = "trained"
    if reused:
        verb = "continued or re-used"
    print(f"{verb:>20}: {len(fitted.log['loss']):,} steps in {out} ({time.perf_counter() - start:.0f} s)")
    return fitted


def _draw(name: str, sampler: AbstractSampler, fitted: Fitted, labels: np.ndarray, key: jax.Array) -> Draws:
    start = time.perf_counter()
    draws = sample(sampler, fitted.ema, len(labels), key=key, cond=labels)
    jax.block_until_ready(draws.value)
    seconds = time.perf_counter() - start
    print(f"{'drew ' + name:>20}: {len(labels):,} digits, {np.mean(draws.nfe):.0f} evaluations each ({seconds:.0f} s)")
    return draws


def _by_class(images: np.ndarray, labels: np.ndarray, per_class: int = 10) -> np.ndarray:
    """The first few images of every class, one class after the other."""
    return np.concatenate([images[labels == label][:per_class] for label in range(10)])


def _print_report(report: dict[str, float]) -> None:
    print("\n  measured on the held-out digits")
    for name, value in report.items():
        print(f"    {name:<66} {value:.4g}")
