"""Training with a run folder: resuming, stopping, being killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training.recipes import Counted, Rows, Squares, build, recipe, same

import genkit as gk
from genkit._core._checks import NonFiniteError
from genkit.storage import CorruptFileError, SaveError
from genkit.training._log import cut_log


KEY = 5


def key():
    return jax.random.key(KEY)


def lines(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_a_run_folder_and_what_is_in_it(tmp_path):
    run = tmp_path / "deep" / "run"
    fitted = gk.fit(recipe(name="sines"), key=key(), run=run)
    assert sorted(path.name for path in run.iterdir()) == ["log.jsonl", "meta.json", "state.gk"]
    meta = json.loads((run / "meta.json").read_text())
    assert meta["seed"] == KEY and meta["num_steps"] == 60 and meta["name"] == "sines" and len(meta["data"]) == 64
    assert {"genkit-jax", "jax", "equinox", "optax", "numpyro"} <= set(meta["versions"])
    log = lines(run)
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(log[2]["loss"], fitted.log["loss"][20:30].mean(), rtol=1e-6)
    assert same(fitted, gk.io.load_run(run, like=recipe()))


@pytest.mark.parametrize("data", [None, Counted()], ids=["traced", "host"])
@pytest.mark.parametrize(("first", "cadence"), [(20, 10), (23, 10), (1, 7), (37, 60)])
def test_resuming_is_bitwise(tmp_path, data, first, cadence):
    whole = gk.fit(recipe(data), key=key())
    gk.fit(recipe(data), key=key(), run=tmp_path / "run", num_steps=first)
    resumed = gk.fit(recipe(data, log_every=cadence), key=key(), run=tmp_path / "run", resume=True)
    assert same(whole, resumed) and same(whole, gk.io.load_run(tmp_path / "run", like=recipe()))
    steps = [line["step"] for line in lines(tmp_path / "run")]
    assert steps == sorted(set(steps)) and steps[-1] == 60


def test_resuming_what_is_done_or_not_begun(tmp_path):
    begun = gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True)
    before = (tmp_path / "run" / "state.gk").read_bytes()
    assert same(begun, gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True))
    assert (tmp_path / "run" / "state.gk").read_bytes() == before
    longer = gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True, num_steps=70)
    assert same(longer, gk.fit(recipe(), key=key(), num_steps=70))


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"st')
    cut_log(log, 20)
    assert log.read_text() == '{"step": 10}\n{"step": 20}\n'


# Refusals; what existed before is intact.


@pytest.fixture
def run(tmp_path):
    gk.fit(recipe(), key=key(), run=tmp_path / "run", num_steps=20)
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`run` must be a new folder; got .* which holds a run. Pass `resume` to continue it"),
        ({"resume": True, "seed": 6}, r"`key` must be the one .* was started with \(seed 5\); got seed 6"),
        ({"resume": True, "data": "other"}, "`data` must be the data .* was started with; their hashes differ"),
        ({"resume": True, "ema": None}, r"it has a leaf `\['state'\].ema.layers\[0\].weight` .* that is not expected"),
        ({"resume": True, "optimizer": "sgd"}, r"it has a leaf `\['state'\].opt\[0\].*` .* that is not expected"),
        (
            {"resume": True, "width": 9},
            r"leaf `\['state'\].model.layers\[0\].weight` must be float32\[9, 2\]",
        ),
    ],
)
def test_a_run_is_not_continued_with_anything_else(run, options, message):
    before = contents(run)
    changes = {}
    if "data" in options:
        changes["data"] = Rows(jnp.ones((64, 2)), 16)
    if "ema" in options:
        changes["ema"] = None
    if "optimizer" in options:
        changes["phases"] = gk.Phase(Squares(), optax.sgd(0.1))
    if "width" in options:
        import equinox as eqx

        changes["build"] = lambda key: eqx.nn.MLP(2, 2, 9, 1, key=key)
    with pytest.raises(ValueError, match=message):
        gk.fit(
            recipe().replace(**changes),
            key=jax.random.key(options.get("seed", KEY)),
            run=run,
            resume=options.get("resume", False),
        )
    assert contents(run) == before


def test_corrupt_runs_are_refused(run):
    content = bytearray((run / "state.gk").read_bytes())
    content[-5] ^= 1
    (run / "state.gk").write_bytes(content)
    before = contents(run)
    with pytest.raises(CorruptFileError, match=r"state.gk` cannot be read: its arrays do not match their checksum"):
        gk.fit(recipe(), key=key(), run=run, resume=True)
    assert contents(run) == before
    (run / "meta.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"meta.json` cannot be read: it is not JSON"):
        gk.fit(recipe(), key=key(), run=run, resume=True)


def test_folders_that_are_something_else(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    for name, message in (("file", "`run` must be a folder; got .* a file"), ("folder", "which holds other files")):
        with pytest.raises(ValueError, match=message):
            gk.fit(recipe(), key=key(), run=tmp_path / name)
    with pytest.raises(ValueError, match=r"`run` must be a folder that can be written; got .*file/below"):
        gk.fit(recipe(), key=key(), run=tmp_path / "file" / "below")
    assert contents(tmp_path) == {tmp_path / "file": b"mine", tmp_path / "folder" / "notes.txt": b"mine"}


def test_a_recipe_that_fails_leaves_nothing_behind(tmp_path):
    wrong = gk.Phase(lambda model, batch, *, key: (batch[0], {}), optax.sgd(0.1))
    with pytest.raises(ValueError, match="must be a floating scalar"):
        gk.fit(recipe(phases=wrong), key=key(), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Numbers that are not finite


KINDS = {"loss": 1, "gradient": 2, "updates": 3}


def breaks(model, batch, *, key):
    """An objective whose loss, gradient or update breaks where the batch says so; batches carry their number."""
    what = batch["breaks"]
    loss = jnp.where(what == KINDS["loss"], jnp.nan, jnp.sum(model["w"] ** 2))
    # The value is 1 everywhere; its gradient is 0 * inf where broken.
    loss = loss + jnp.sqrt(jnp.where(what == KINDS["gradient"], 0 * model["w"][0], 1.0))
    updates = {"w": None, "seen": jnp.where(what == KINDS["updates"], jnp.inf, model["seen"] + 1)}
    return loss, {"updates": updates}


def numbers(start):
    return (np.asarray(i) for i in range(start, 10_000))


def breaking(at, what):
    """Batches of which one breaks the objective."""
    return gk.data.Host(lambda start: ({"breaks": np.asarray(KINDS[what] * (i == at))} for i in range(start, 10_000)))


PHASE = gk.Phase(breaks, optax.adam(0.01))


def start(key):
    return {"w": jnp.ones(3), "seen": jnp.zeros(())}


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize(("at", "log_every"), [(0, 10), (7, 10), (23, 10), (137, 4), (59, 100)])
def test_what_is_not_finite_stops_at_its_step(tmp_path, what, at, log_every):
    def config(at):
        return gk.Recipe(start, breaking(at, what), PHASE, 200, ema=0.9, log_every=log_every)

    word = {"loss": "loss", "gradient": "gradient", "updates": "updated model"}[what]
    with pytest.raises(NonFiniteError, match=f"training stopped: the {word} is not finite at step {at} ") as caught:
        gk.fit(config(at), key=key(), run=tmp_path / "run")
    kept = caught.value.fitted
    assert int(kept.state.step) == at and all(len(values) == at for values in kept.log.values())
    if at:
        assert same(kept, gk.fit(config(-1), key=key(), num_steps=at))
        assert same(kept.state, gk.io.load_run(tmp_path / "run", like=config(at)).state)


def test_the_phase_is_named():
    phases = [
        gk.Phase(lambda m, b, *, key: (jnp.sum(m["w"] ** 2), {}), optax.sgd(0.1)),
        gk.Phase(breaks, optax.sgd(0.1), repeats=2, name="critic"),
    ]
    # Batches 0-2 belong to step 0, 3-5 to step 1, 6 to the first phase of step 2: 7 and 8 are the critic's.
    config = gk.Recipe(start, breaking(6, "loss"), phases, 9)
    gk.fit(config, key=key())
    with pytest.raises(NonFiniteError, match="the loss of critic is not finite at step 2") as caught:
        gk.fit(config.replace(data=breaking(8, "loss")), key=key())
    # Half a cycle is no state to keep: that before the step is.
    np.testing.assert_allclose(caught.value.fitted.model["seen"], 4.0)


def test_infinities_that_were_there_are_fine():
    make = lambda key: {"w": jnp.ones(3), "mask": jnp.array([0.0, -jnp.inf, 0.0])}
    loss = lambda m, b, *, key: (jnp.sum(m["w"] ** 2), {"bound": m["mask"][1]})
    plateau = optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau())  # its best value starts at infinity
    config = gk.Recipe(make, jax.tree_util.Partial(lambda key: 0.0), gk.Phase(loss, plateau, lambda m: m["w"]), 20)
    assert int(gk.fit(config, key=key()).state.step) == 20


def test_a_moment_that_leaves_the_numbers_alone_is_no_fault():
    # A gradient of 1e25 squares to infinity in the second moment; the model stays sound, so training goes on.
    loss = lambda m, b, *, key: (jnp.where(b == 3, 1e25, 1.0) * jnp.sum(m), {})
    config = gk.Recipe(lambda key: jnp.ones(2), gk.data.Host(numbers), gk.Phase(loss, optax.adam(0.1)), 10, log_every=2)
    fitted = gk.fit(config, key=key())
    assert int(fitted.state.step) == 10 and np.isfinite(fitted.model).all()
    assert not np.isfinite(fitted.state.opt[0][0].nu).all()


def test_a_by_product_that_is_no_number_is_a_warning():
    def objective(model, batch, *, key):
        return jnp.sum(model**2), {"share": jnp.where(batch >= 7, jnp.nan, 1.0), "bound": -jnp.inf}

    config = gk.Recipe(lambda key: jnp.ones(2), gk.data.Host(numbers), gk.Phase(objective, optax.sgd(0.1)), 20)
    with pytest.warns(UserWarning, match="`share` is NaN at step 7, while the loss and the model are finite") as caught:
        fitted = gk.fit(config.replace(log_every=5), key=key())
    assert len(caught) == 1 and np.isnan(fitted.log["share"][7:]).all()


# Callbacks and interrupts


def test_on_step_sees_every_step_once():
    seen = []
    fitted = gk.fit(recipe(), key=key(), num_steps=23, on_step=lambda step, metrics: seen.append((step, metrics)))
    assert [step for step, _ in seen] == list(range(23))
    assert [metrics["loss"] for _, metrics in seen] == fitted.log["loss"].tolist()
    assert all(type(metrics["size"]) is float for _, metrics in seen)


def test_a_callback_may_stop_the_training(tmp_path):
    seen = []

    def on_step(step, metrics):
        seen.append(step)
        if step == 25:
            raise StopIteration

    stopped = gk.fit(recipe(), key=key(), run=tmp_path / "run", on_step=on_step)
    assert seen == list(range(26))
    assert int(stopped.state.step) == len(stopped.log["loss"]) == 30  # the call it was part of is whole
    resumed = gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, gk.fit(recipe(), key=key()))


def test_a_callback_that_fails_keeps_the_work(tmp_path):
    def on_step(step, metrics):
        if step == 25:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        gk.fit(recipe(), key=key(), run=tmp_path / "run", on_step=on_step)
    resumed = gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, gk.fit(recipe(), key=key()))
    assert lines(tmp_path / "run")[2]["step"] == 30


def test_ctrl_c_keeps_the_work(tmp_path, capsys):
    before = signal.getsignal(signal.SIGINT)

    def on_step(step, metrics):
        if step == 25:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match=r"interrupted after 30 of 60 steps; resume the run in") as caught:
        gk.fit(recipe(), key=key(), run=tmp_path / "run", on_step=on_step)
    assert "Press Ctrl-C again to stop immediately" in capsys.readouterr().err
    assert int(caught.value.fitted.state.step) == 30 and signal.getsignal(signal.SIGINT) is before
    resumed = gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, gk.fit(recipe(), key=key()))


def test_ctrl_c_twice_stops_at_once(tmp_path):
    def on_step(step, metrics):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        gk.fit(recipe(), key=key(), run=tmp_path / "run", on_step=on_step)
    assert not hasattr(caught.value, "fitted")
    resumed = gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True)
    assert same(resumed, gk.fit(recipe(), key=key()))


def test_a_full_disk_ends_training_with_one_clear_error(tmp_path, monkeypatch):
    gk.fit(recipe(), key=key(), run=tmp_path / "run", num_steps=20)
    before = (tmp_path / "run" / "state.gk").read_bytes()

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("genkit.storage._files.os.fsync", full)
    with pytest.raises(SaveError, match="No space left on device; the file that was there is intact"):
        gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True)
    monkeypatch.undo()
    assert (tmp_path / "run" / "state.gk").read_bytes() == before
    assert same(gk.fit(recipe(), key=key(), run=tmp_path / "run", resume=True), gk.fit(recipe(), key=key()))


# Being killed


def kill_and_resume(run, moments, num_steps, host):
    """Train in processes of their own, killed after `moments` seconds from the first sign of life; then to the end."""
    script = Path(__file__).with_name("recipes.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parents[2]), str(script.parents[1])])}
    command = [sys.executable, str(script), str(run), str(num_steps), "host" if host else "traced"]
    killed = 0
    for moment in moments:
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        size = run.joinpath("log.jsonl").stat().st_size if run.joinpath("log.jsonl").exists() else 0
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            log = run / "log.jsonl"
            if log.exists() and log.stat().st_size != size:
                break
            time.sleep(0.002)
        time.sleep(moment)
        killed += process.poll() is None
        process.kill()
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
    subprocess.run(command, env=environment, check=True)
    return killed


def uninterrupted(num_steps, host):
    return gk.fit(recipe(Counted() if host else None, num_steps), key=key())


def test_kill_and_resume_is_bitwise(tmp_path):
    run, num_steps = tmp_path / "run", 4000
    killed = kill_and_resume(run, [0.0, 0.05], num_steps, host=False)
    assert killed >= 1, "the training was over before it could be killed"
    fitted = gk.io.load_run(run, like=recipe(num_steps=num_steps))
    assert same(fitted, uninterrupted(num_steps, host=False))
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_moments(tmp_path):
    moments = np.random.default_rng(0).uniform(0.0, 0.15, 20)
    for host, part in ((False, moments[:14]), (True, moments[14:])):
        run, num_steps = tmp_path / f"run{host}", 20_000
        killed = kill_and_resume(run, part, num_steps, host)
        assert killed >= len(part) - 2
        fitted = gk.io.load_run(run, like=recipe(Counted() if host else None, num_steps))
        assert same(fitted, uninterrupted(num_steps, host))
        assert [line["step"] for line in lines(run)][-1] == num_steps


def test_whatever_a_kill_may_leave_can_be_resumed(tmp_path):
    # Before the first checkpoint: an empty folder, a temporary file, a run without a state, a log without one.
    whole = gk.fit(recipe(), key=key(), run=tmp_path / "whole")
    meta = (tmp_path / "whole" / "meta.json").read_bytes()
    for i, files in enumerate(
        [
            {},
            {".meta.json.abc.tmp": meta[:20]},
            {"meta.json": meta},
            {"meta.json": meta, "log.jsonl": b'{"step": 10}\n{"s'},
        ]
    ):
        run = tmp_path / f"run{i}"
        run.mkdir()
        for name, content in files.items():
            (run / name).write_bytes(content)
        assert same(whole, gk.fit(recipe(), key=key(), run=run, resume=True))
        assert [line["step"] for line in lines(run)] == [10, 20, 30, 40, 50, 60]


def test_build_is_not_called_twice_on_loading(run):
    # A skeleton is enough, so nothing is computed; but a `build` that looks at numbers works too.
    def looks(key):
        model = build(key)
        assert float(model.layers[0].bias[0]) != 5.0
        return model

    assert same(gk.io.load_run(run, like=recipe()), gk.io.load_run(run, like=recipe().replace(build=looks)))


HELD = """
import sys, time
import genkit as gk
with gk.storage.lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer(tmp_path):
    run = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HELD, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"is being written by process {holder.pid} on"):
            gk.fit(recipe(), key=key(), run=run)
    finally:
        holder.kill()
        holder.communicate()
    # The lock ends with its process; its file does not stand in the way.
    gk.fit(recipe(), key=key(), run=run)
    assert not (run / ".lock").exists()


def test_a_checkpoint_of_another_run_is_refused(run, tmp_path):
    other = tmp_path / "other"
    gk.fit(recipe(), key=jax.random.key(KEY + 1), run=other)
    (run / "state.gk").write_bytes((other / "state.gk").read_bytes())
    with pytest.raises(CorruptFileError, match="it belongs to another run"):
        gk.fit(recipe(), key=key(), run=run, resume=True, num_steps=70)
    with pytest.raises(CorruptFileError, match="it belongs to another run"):
        gk.load(run, like=recipe())


def test_every_bit_of_the_facts_is_checked(run):
    content = (run / "meta.json").read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 400):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (run / "meta.json").write_bytes(damaged)
        with pytest.raises(CorruptFileError, match="meta.json"):
            gk.storage.read_meta(run)


def test_a_run_gives_its_model_without_running_code(run):
    whole = gk.load(run, like=recipe())
    assert same(gk.load(run, like=build(key())), whole.ema)


def test_a_folder_that_is_deleted_meanwhile_does_not_cost_the_training(tmp_path):
    run = tmp_path / "run"

    def delete(step, metrics):
        if step == 35:
            shutil.rmtree(run)

    fitted = gk.fit(recipe(), key=key(), run=run, on_step=delete)
    assert same(fitted, gk.load(run, like=recipe()))
