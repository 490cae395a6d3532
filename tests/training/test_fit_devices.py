"""Training on several devices and in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


HERE = Path(__file__).resolve()
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE.parents[1])])}

FOUR = """
import jax, numpy as np
from jax.sharding import AxisType
import genkit as gk
from training.recipes import Counted, Rows, recipe, same

key = jax.random.key(3)
assert len(jax.devices()) == 4
for data in (None, Counted()):
    one = gk.fit(recipe(data, num_steps=20), key=key)
    for types in ((AxisType.Auto,), (AxisType.Explicit,)):
        mesh = jax.make_mesh((4,), ("batch",), axis_types=types)
        four = gk.fit(recipe(data, num_steps=20), key=key, mesh=mesh)
        print(np.abs(one.log["loss"] - four.log["loss"]).max())
        assert len(four.model.layers[0].weight.sharding.device_set) == 1
mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
print(np.abs(gk.fit(recipe(num_steps=20), key=key).log["loss"] - gk.fit(
    recipe(num_steps=20), key=key, mesh=mesh).log["loss"]).max())
try:
    gk.fit(recipe().replace(data=Rows(recipe().data.x, 6)), key=key, mesh=mesh)
except ValueError as error:
    print(error)
"""


def test_four_devices_equal_one():
    environment = ENVIRONMENT | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", FOUR], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *differences, refusal = done.stdout.splitlines()
    assert len(differences) == 5 and max(map(float, differences)) < 1e-5
    assert refusal.startswith(
        "`batch[0]` must be of a leading axis divisible by the 4 devices of `mesh`; got shape (6,"
    )


DEFINITION = """
import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax
import genkit as gk


class Rows(eqx.Module):
    x: jax.Array

    def __call__(self, key):
        return self.x[jax.random.randint(key, (16,), 0, len(self.x))]


def loss(model, batch, *, key):
    noise = 0.1 * jax.random.normal(key, batch.shape)
    return jnp.mean((jax.vmap(model)(batch + noise) - jnp.sin(batch)) ** 2), {}


recipe = gk.Recipe(
    lambda key: eqx.nn.MLP(2, 2, 8, 1, key=key),
    Rows(jnp.asarray(np.random.default_rng(0).normal(size=(64, 2)), jnp.float32)),
    gk.Phase(loss, optax.adam(3e-3)),
    40,
    ema=0.99,
    log_every=10,
)
"""


def train(folder, run, *options, wait=True):
    command = [sys.executable, "-m", "genkit.cli", "train", str(folder / "m.py"), "--out", str(folder / run), *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process.communicate(timeout=240), process.returncode if wait else process


def train_in_two(folder, run, *options):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = [sys.executable, "-m", "genkit.cli", "train", str(folder / "m.py"), "--out", str(folder / run), *options]
    group = ["--coordinator", f"127.0.0.1:{port}", "--num-processes", "2", "--process-id"]
    processes = [
        subprocess.Popen(
            [*base, *group, str(i)], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [out for out, _ in outputs]


@pytest.mark.slow
def test_two_processes_write_one_run(tmp_path):
    import genkit as gk

    (tmp_path / "m.py").write_text(DEFINITION)
    (_, errors), status = train(tmp_path, "one")
    assert status == 0, errors
    first, second = train_in_two(tmp_path, "two", "--steps", "20")
    assert "20 steps done" in first and "steps done" not in second
    train_in_two(tmp_path, "two", "--resume")
    one, two = gk.load(tmp_path / "one"), gk.load(tmp_path / "two")
    assert np.abs(one.log["loss"] - two.log["loss"]).max() < 1e-5 and len(two.log["loss"]) == 40
    log = (tmp_path / "two" / "log.jsonl").read_text().splitlines()
    assert len(log) == 4  # one writer
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"definition.py", "log.jsonl", "log.png", "meta.json", "state.gk"}
