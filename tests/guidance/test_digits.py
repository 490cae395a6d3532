"""Guidance of digits (D7): a kernel mixture of real images, exact, and the networks of the zoo; judges apart."""

from pathlib import Path

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import genkit as gk


gd, gg = gk.diffusion, gk.guidance
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def judge():
    """Accuracy under a logistic regression fitted to the held-out images, and size beside the data."""
    from sklearn.linear_model import LogisticRegression

    digits = gk.data.digits()
    flat = lambda x: np.asarray(x).reshape(len(x), -1)
    model = LogisticRegression(max_iter=2000, C=0.1).fit(flat(digits.x_test), digits.y_test)
    size = np.sqrt((np.asarray(digits.x_train) ** 2).mean())

    def measure(draws, cond):
        x = flat(draws.value)
        accuracy = (model.predict(x) == np.asarray(cond)).mean()
        return float(accuracy), float(np.sqrt((x**2).mean()) / size), float((np.abs(x) > 1.2).mean())

    return measure


@pytest.mark.long
def test_projection_does_not_saturate_digits(judge):
    digits = gk.data.digits()
    x, y = digits.x_train[:600], digits.y_train[:600]
    law = gd.MixtureDenoiser(jnp.ones(len(x)), jnp.asarray(x), jnp.asarray(0.25**2), labels=np.asarray(y))
    table, n = gd.ddim(gd.karras(24, 0.02, 40.0)), 200
    cond = np.arange(n) % 10
    run = lambda g: judge(gk.sample(table, law, n, cond=jnp.asarray(cond), guidance=g, key=jr.key(0)), cond)
    plain, guided, projected = run(gg.cfg(1.0)), run(gg.cfg(8.0)), run(gg.apg(8.0, norm_threshold=1.0))
    assert guided[0] >= plain[0] and projected[0] >= plain[0]
    assert guided[1] > projected[1] and guided[2] > projected[2]
    assert projected[1] < plain[1] + 0.03


@pytest.mark.long
def test_trained_digits(judge):
    """The same on the networks of the zoo, and autoguidance by the weak one."""
    strong = gk.fit(gk.load(ROOT / "models" / "digits.py"), key=jr.key(0)).ema
    weak = gk.fit(gk.load(ROOT / "models" / "digits_weak.py"), key=jr.key(1)).ema
    table, n = gd.heun(gd.karras(18, 0.002, 80.0)), 500
    cond = np.arange(n) % 10

    def run(name, guidance):
        draws = gk.sample(table, strong, n, cond=jnp.asarray(cond), guidance=guidance, key=jr.key(2))
        return judge(draws, cond)

    plain = run("cond", gg.cfg(1.0))
    four, eight = run("cfg 4", gg.cfg(4.0)), run("cfg 8", gg.cfg(8.0))
    projected = run("apg 8, r = 1", gg.apg(8.0, norm_threshold=1.0))
    run("interval cfg 4", gg.interval(gg.cfg(4.0), 0.3, 3.0))
    run("autoguide 2", gg.autoguide(weak, 2.0))
    run("adaptive cfg 4", gg.adaptive(gg.cfg(4.0), 0.99))
    run("reflect", gg.reflect(weak, sigma_lo=1.0))
    assert four[0] >= plain[0] and eight[2] > projected[2]
