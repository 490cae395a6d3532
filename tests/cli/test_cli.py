"""The command line: what it does, and the one line it says when it cannot."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import genkit as gk
from genkit.cli import main
from genkit.cli._zoo import zoo_file


ROOT = Path(__file__).resolve().parents[2]

MODEL = '''"""A Gaussian whose mean is learned."""
import equinox as eqx, jax, jax.numpy as jnp, optax
import genkit as gk


class Shrink(eqx.Module):
    mean: jax.Array
    shape: tuple = eqx.field(static=True, default=(2,))

    def __call__(self, x, sigma, cond=None):
        shift = 0.0 if cond is None else jnp.where(jnp.isfinite(cond * 1.0), cond * 1.0, 0.0)
        return (x + sigma**2 * (self.mean + shift)) / (1 + sigma**2)


def loss(model, batch, *, key):
    return jnp.mean((model.mean - batch) ** 2), {}


draw = jax.tree_util.Partial(lambda key: 3.0 + jax.random.normal(key, (32, 2)))
recipe = gk.Recipe(lambda key: Shrink(jnp.zeros(2)), draw, gk.Phase(loss, optax.adam(0.1)), 60, ema=0.9, log_every=20)
'''

SAMPLER = '''"""Deterministic."""
from genkit.diffusion import ddim, karras
sampler = ddim(karras(16, 0.02, 200.0))
'''

PROBLEM = '''"""A coin."""
import genkit as gk
problem = gk.Problem(lambda flips: None, ([1, 0, 1],))
'''

METHOD = '''"""The conjugate answer, as a method."""
import jax, jax.numpy as jnp, numpy as np
import genkit as gk


class Conjugate:
    def run(self, problem, *, key):
        (flips,) = problem.args
        p = np.asarray(jax.random.beta(key, 1.0 + sum(flips), 1.0 + len(flips) - sum(flips), (1000,)))
        return gk.Posterior({"p": p}, np.zeros(1000), ("draw",), log_q=np.zeros(1000))


sampler = Conjugate()
'''

FILES = {"model.py": MODEL, "sampler.py": SAMPLER, "problem.py": PROBLEM, "method.py": METHOD}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder, capsys):
    assert main(["train", "model.py", "--out", "run"]) == 0
    capsys.readouterr()
    return folder / "run"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_train_sample_info(folder, capsys):
    assert main(["train", "model.py", "--out", "runs/deep", "--seed", "4"]) == 0
    assert capsys.readouterr().out.startswith("60 steps done, run in runs/deep; means of the last 100 steps: loss ")
    names = {path.name for path in (folder / "runs" / "deep").iterdir()}
    assert names == {"definition.py", "log.jsonl", "log.png", "meta.json", "state.gk"}

    assert main(["sample", "runs/deep", "--sampler", "sampler.py", "-n", "500"]) == 0
    assert "500 draws of shape (2,), 16 evaluations each: runs/deep/draws/draws.npz" in capsys.readouterr().out
    draws = gk.io.load_draws("runs/deep/draws/draws.npz")
    mean = np.asarray(gk.load("runs/deep").ema.mean)
    # 500 draws of unit variance and two numbers to compare: 5.03 standard errors, and the grid's small error.
    assert np.abs(draws["value"].mean(0) - mean).max() < 5.03 / np.sqrt(500) + 0.05
    facts = json.loads(Path("runs/deep/draws/draws.json").read_text())
    assert (facts["num_samples"], facts["seed"], facts["cond"]) == (500, 0, None)

    before = contents(folder)
    assert main(["info", "runs/deep"]) == 0
    told = capsys.readouterr().out
    for part in ("steps: 60 of 60", "seed: 4", "definition: model.py", "jax ", "checksums right", ".mean: float32[2]"):
        assert part in told
    assert contents(folder) == before


def test_resume_continues_and_finds_the_seed(folder, capsys):
    assert main(["train", "model.py", "--out", "whole", "--seed", "4"]) == 0
    assert main(["train", "model.py", "--out", "parts", "--seed", "4", "--steps", "20"]) == 0
    assert main(["train", "model.py", "--out", "parts", "--resume"]) == 0
    whole, parts = gk.load("whole"), gk.load("parts")
    assert np.array_equal(whole.model.mean, parts.model.mean) and np.array_equal(whole.log["loss"], parts.log["loss"])


def test_sample_options(run, capsys):
    command = ["sample", "run", "--sampler", "sampler.py", "-n", "4", "--out"]
    assert main([*command, "a", "--cond", "3", "--seed", "7", "--batch-size", "2"]) == 0
    assert main([*command, "b", "--cond", "3,3,3,3", "--seed", "7"]) == 0
    assert main([*command, "c", "--seed", "7"]) == 0
    a, b, c = (gk.io.load_draws(f"{name}/draws.npz")["value"] for name in "abc")
    assert np.array_equal(a, b)
    np.testing.assert_allclose(a - c, 3.0, atol=0.1)  # the condition shifts the mean


def test_a_sampler_for_another_kind_of_model(folder, capsys):
    """A model that is called with a state alone is no denoiser."""
    Path("path.py").write_text(MODEL.replace("def __call__(self, x, sigma, cond=None):", "def __call__(self, x):"))
    assert main(["train", "path.py", "--out", "path", "--steps", "2"]) == 0
    assert main(["sample", "path", "--sampler", "sampler.py", "-n", "2"]) == 2
    assert "path holds a Shrink. Take a sampler made for it" in capsys.readouterr().err


def test_infer(folder, capsys):
    assert main(["infer", "problem.py", "--sampler", "method.py", "--out", "out"]) == 0
    printed = capsys.readouterr().out
    samples = gk.io.load_draws("out/samples.npz")["p"]
    assert printed == Path("out/summary.txt").read_text() and f"{samples.mean():.3f}" in printed
    assert main(["infer", "problem.py", "--sampler", "method.py", "--seed", "1"]) == 0
    assert capsys.readouterr().out != printed


def test_info_of_files_runs_nothing(folder, capsys):
    Path("bomb.py").write_text('"""Bang."""\nimport os\nos.mkdir("boom")\nrecipe = 1\n')
    gk.save("weights.gk", {"w": jnp.ones((2, 3))})
    gk.save("draws.npz", {"x": np.ones(3)})
    for path, part in (
        ("bomb.py", "binds recipe\nBang."),
        ("weights.gk", "['w']: float32[2, 3]"),
        ("draws.npz", "x: float64[3]"),
    ):
        assert main(["info", path]) == 0
        assert part in capsys.readouterr().out
    assert not Path("boom").exists()


def test_info_tells_an_altered_definition(run, capsys):
    with (run / "definition.py").open("a") as file:
        file.write("# mine\n")
    assert main(["info", "run"]) == 0
    assert "(the copy in the run was altered since)" in capsys.readouterr().out


def test_needs_through_the_command_line(run, capsys):
    student = MODEL.replace("def loss", 'needs = {"teacher": "model.py"}\n\n\ndef loss').replace(
        "lambda key: Shrink(jnp.zeros(2))", "lambda key, teacher: Shrink(teacher.mean)"
    )
    Path("student.py").write_text(student)
    assert main(["train", "student.py", "--out", "student", "--with", "teacher=run", "--steps", "3"]) == 0
    assert main(["info", "student"]) == 0
    assert "needs teacher: run (copy in student/needs/teacher)" in capsys.readouterr().out
    teacher, student = np.asarray(gk.load("run").ema.mean), np.asarray(gk.load("student").model.mean)
    assert np.abs(student - teacher).max() < 0.5 and np.abs(teacher).min() > 2


def test_zoo(folder, capsys):
    assert main(["zoo", "list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert all(re.match(r"(models|samplers)/\w+\.py +\S", line) for line in listed) and len(listed) >= 5
    for name in ("two_moons", "samplers/unipc", "samplers/dpmpp.py"):
        assert main(["zoo", "copy", name]) == 0
        copied = Path(capsys.readouterr().out.strip())
        assert copied.read_bytes() == zoo_file(name).read_bytes()
    assert main(["zoo", "copy", "two_moons"]) == 2
    assert "`two_moons.py` exists; it is left as it is" in capsys.readouterr().err


# Wrong input: one line, status 2, nothing written.

ONE = "genkit {command}: "
WRONG = [
    ("train gone.py --out new", "no definition file at `gone.py`"),
    ("train . --out new", "no definition file at `.`: it is a folder"),
    ("train sampler.py --out new", "must bind `recipe` (a gk.Recipe); found: ddim (a function)"),
    ("train problem.py --out new", "must bind `recipe` (a gk.Recipe); found: problem (a Problem)"),
    ("train broken.py --out new", "broken.py, line 2: "),
    ("train empty.py --out new", "empty.py must bind `recipe` (a gk.Recipe); found: nothing."),
    ("train wrong.py --out new", "wrong.py must bind `recipe` to a gk.Recipe; found: an int."),
    (
        "train model.py --out run",
        "--out must be a new folder; got `run`, which holds a run. Pass --resume to continue it.",
    ),
    (
        "train model.py --out run --resume --seed 9",
        "--seed must be the one `run` was started with (seed 0); got seed 9",
    ),
    ("train model.py --out model.py", "--out must be a folder; got `model.py`, which is a file"),
    ("train model.py --out other", "--out must be a new or empty folder, or a run; got `other`"),
    ("train model.py --out bad --resume", "`bad/state.gk` cannot be read: its arrays do not match their checksum"),
    ("train model.py", "the following arguments are required: --out"),
    ("train model.py --out new --stepz 3", "unrecognized arguments: --stepz 3; did you mean --steps?"),
    ("train model.py --out new --step 3", "unrecognized arguments: --step 3; did you mean --steps?"),
    ("train model.py --out new --steps 0", "argument --steps: must be an integer >= 1; got '0'"),
    ("train model.py --out new --steps few", "argument --steps: must be an integer >= 1; got 'few'"),
    ("train model.py --out new --seed -1", "argument --seed: "),
    ("train model.py --out new --with teacher", "argument --with: must read NAME=RUN; got 'teacher'"),
    ("train model.py --out new --with teacher=run", "needs nothing; got `teacher` besides"),
    ("train needy.py --out new", "needs `teacher`, a run of model.py; give one with --with teacher=RUN"),
    ("train needy.py --out new --with teacher=gone", "`gone` is not a run folder: it has no meta.json"),
    ("train needy.py --out new --with teacher=bad", "`bad/state.gk` cannot be read"),
    ("train needy.py --out new --with teacher=run --with teacher=run", "--with names a model twice"),
    ("train model.py --out new --coordinator h:1", "--coordinator, --num-processes and --process-id go together"),
    ("train model.py --out new --coordinator h --num-processes 2 --process-id 0", "--coordinator must read HOST:PORT"),
    ("train model.py --out new --coordinator h:1 --num-processes 2 --process-id 2", "--process-id must be < "),
    ("train model.py --out new --devices 99", "--devices must be <= "),
    ("train nan.py --out new", "training stopped: the loss is not finite at step 0"),
    ("train shapes.py --out new", "`loss of phase0` must be a floating scalar; got float32[32]"),
    ("sample gone --sampler sampler.py -n 4 --out new", "`gone` is not a run folder"),
    ("sample other --sampler sampler.py -n 4 --out new", "`other` is not a run folder"),
    ("sample bad --sampler sampler.py -n 4 --out new", "`bad/state.gk` cannot be read"),
    ("sample run --sampler gone.py -n 4 --out new", "no definition file at `gone.py`"),
    ("sample run --sampler model.py -n 4 --out new", "must bind `sampler`"),
    (
        "sample run --sampler method.py -n 4 --out new",
        "binds a method for `genkit infer`, not a sampler",
    ),
    ("sample run --sampler sampler.py -n 0 --out new", "must be an integer >= 1; got '0'"),
    ("sample run --sampler sampler.py -n 4 --cond x --out new", "argument --cond: must be numbers joined by commas"),
    (
        "sample run --sampler sampler.py -n 4 --cond 1,2 --out new",
        "--cond must be one number or 4, one per draw",
    ),
    ("sample run --sampler negative.py -n 4 --out new", "negative.py, line 2: "),
    ("sample run --sampler rising.py -n 4 --out new", "rising.py, line 2: "),
    ("infer model.py --sampler method.py", "must bind `problem` (a gk.Problem)"),
    ("infer problem.py --sampler sampler.py", "binds a sampler for `genkit sample`, not a method for `genkit infer`"),
    ("info gone", "`gone` is neither a run folder nor a file (nothing there)"),
    ("info other", "`other` is neither a run folder nor a file (a folder)"),
    ("info bad", "`bad/state.gk` cannot be read"),
    ("info notes.txt", "it is none of the files that genkit writes"),
    ("info broken.py", "broken.py, line 2: "),
    ("info broken.npz", "it is not a sound .npz archive"),
    ("zoo copy digit", "Did you mean 'digits'?"),
    ("zoo copy ../../etc/passwd", "the zoo has no '../../etc/passwd'. `genkit zoo list` shows what there is."),
    ("zoo copy digits --out gone", "no folder at `gone`"),
    ("paint x", "invalid choice: 'paint'"),
    ("trian x", "invalid choice: 'trian'; did you mean train?"),
    ("--verison", "unrecognized arguments: --verison; did you mean --version?"),
    ("train exits.py --out new", "exits.py, line 2: it calls sys.exit('enough')"),
    ("train binary.py --out new", "binary.py is not a Python text file"),
    ("info binary.py", "binary.py is not a Python text file"),
    ("sample run --sampler heun -n 4", "did you mean 'heun_cfg' of the zoo? `genkit zoo copy heun_cfg`"),
    ("sample run --sampler samplers/heun_cfg.py -n 4", "; `genkit zoo copy heun_cfg` puts the one of the zoo here"),
    (
        "sample run --sampler sampler.py -n 4 --out notes.txt",
        "--out must be a folder; got `notes.txt`, which is a file",
    ),
    ("sample edited --sampler sampler.py -n 4", "was edited since the training began"),
    ("sample mixed --sampler sampler.py -n 4", "`mixed/state.gk` cannot be read: it belongs to another run"),
    ("info mixed", "`mixed/state.gk` cannot be read: it belongs to another run"),
    ("sample labels --sampler sampler.py -n 4 --cond 1.5", "--cond must be labels of labels, integers from 0 to 2"),
    ("sample labels --sampler sampler.py -n 4 --cond 3", "--cond must be labels of labels"),
    ("infer problem.py --sampler method.py --out notes.txt", "--out must be a folder; got `notes.txt`"),
]


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """A folder with everything that the commands of `WRONG` stumble over."""
    folder = tmp_path_factory.mktemp("wrong")
    before = Path.cwd()
    os.chdir(folder)
    texts = FILES | {
        "broken.py": "import os\ndef f(:\n",
        "empty.py": "",
        "wrong.py": "recipe = 3\n",
        "needy.py": MODEL + '\nneeds = {"teacher": "model.py"}\n',
        "nan.py": MODEL.replace("jnp.mean(", "jnp.nan * jnp.mean("),
        "shapes.py": MODEL.replace("jnp.mean((model.mean - batch) ** 2)", "(model.mean - batch)[:, 0]"),
        "negative.py": "from genkit.diffusion import ddim\nsampler = ddim([1.0, -0.5])\n",
        "rising.py": "from genkit.diffusion import ddim\nsampler = ddim([0.1, 1.0])\n",
        "notes.txt": "mine",
        "broken.npz": "mine",
        "other/notes.txt": "mine",
        "exits.py": "import sys\nsys.exit('enough')\n",
        "labels.py": MODEL.replace(
            "    shape: tuple", "    num_labels: int = eqx.field(static=True, default=3)\n    shape: tuple"
        ),
    }
    for name, text in texts.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    try:
        assert main(["train", "model.py", "--out", "run", "--steps", "3"]) == 0
        assert main(["train", "model.py", "--out", "mixed", "--steps", "3", "--seed", "5"]) == 0
        assert main(["train", "labels.py", "--out", "labels", "--steps", "3"]) == 0
        Path("mixed/state.gk").write_bytes(Path("run/state.gk").read_bytes())
        shutil.copytree("run", "edited")
        Path("edited/definition.py").write_text(MODEL.replace("3.0 +", "4.0 +"))
        Path("binary.py").write_bytes(bytes(range(256)))
        Path("bad").mkdir()
        for path in Path("run").iterdir():
            Path("bad", path.name).write_bytes(path.read_bytes())
        state = bytearray(Path("bad/state.gk").read_bytes())
        state[-1] ^= 4
        Path("bad/state.gk").write_bytes(state)
        yield folder
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("line", "message"), WRONG, ids=[line or "nothing" for line, _ in WRONG])
def test_wrong_input_is_told_in_one_line(wrong, line, message, capsys, monkeypatch):
    monkeypatch.chdir(wrong)
    before = contents(wrong)
    try:
        status = main(line.split())
    except SystemExit as stop:  # argparse's way out
        status = stop.code
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert message in printed.err and printed.err.count("\n") == 1 and printed.err.startswith("genkit")
    assert contents(wrong) == before


def test_errors_nobody_expected_are_not_swallowed(folder, capsys):
    Path("odd.py").write_text(
        MODEL.replace("return jnp.mean", "raise RuntimeError('odd\\nthing')\n    return jnp.mean")
    )
    assert main(["train", "odd.py", "--out", "new"]) == 1
    assert capsys.readouterr().err == "genkit train: RuntimeError: odd (--debug shows where)\n"
    assert main(["train", "odd.py", "--out", "new", "--debug"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "odd.py" in shown and "RuntimeError: odd" in shown
    assert not Path("new").exists()


def test_only_a_folder_that_holds_something_is_named(folder, capsys):
    Path("nan.py").write_text(MODEL.replace("jnp.mean(", "jnp.nan * jnp.mean("))
    assert main(["train", "nan.py", "--out", "new"]) == 2
    assert "`new`" not in capsys.readouterr().err and not Path("new").exists()


def test_an_interrupt_is_130(folder, capsys):
    Path("slow.py").write_text("raise KeyboardInterrupt")
    assert main(["train", "slow.py", "--out", "new"]) == 130
    assert capsys.readouterr().err == "genkit train: interrupted\n"


def test_a_full_disk_is_one_line(run, capsys, monkeypatch):
    before = contents(run)

    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("genkit.storage._files.os.fsync", full)
    assert main(["train", "model.py", "--out", "run", "--resume", "--steps", "70"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device; the file that was there is intact" in error
    assert {name: data for name, data in contents(run).items() if name != "log.jsonl"} == {
        name: data for name, data in before.items() if name != "log.jsonl"
    }


def test_the_command_is_installed():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "genkit"]
    done = subprocess.run([*command, "--version"], env=environment, capture_output=True, text=True)
    assert done.stdout == f"genkit {gk.__version__}\n" and done.returncode == 0
    done = subprocess.run([*command, "train", "gone.py", "--out", "x"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("genkit train: no definition file at `gone.py`")


@pytest.mark.parametrize("command", ["demo", "train", "sample", "infer", "info", "zoo"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"genkit {command}" in capsys.readouterr().out


def test_an_edited_definition_is_run_only_when_trusted(run, capsys):
    with (run / "definition.py").open("a") as file:
        file.write("# mine\n")
    command = ["sample", "run", "--sampler", "sampler.py", "-n", "4"]
    assert main(command) == 2
    assert "Pass --trust-edited to run it all the same." in capsys.readouterr().err
    assert main([*command, "--trust-edited"]) == 0


def test_genkit_alone_shows_the_help(capsys):
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


LIGHT = """
import sys
from genkit.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
print("jax" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("line", ["--help", "--version", "zoo list", "info run", "info run/state.gk", "info draws.npz"])
def test_commands_that_only_look_need_no_jax(wrong, line, monkeypatch):
    monkeypatch.chdir(wrong)
    gk.save("draws.npz", {"x": np.ones(3)})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LIGHT, *line.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    Path("draws.npz").unlink()
    assert done.stderr == "False\n" and done.stdout


def test_a_reader_that_stops_is_no_error():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    genkit = f"{sys.executable} -m genkit zoo list"
    done = subprocess.run(["bash", "-c", f"{genkit} | head -n 1"], env=environment, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("models/")


def stopped(folder, number, *, after):
    """Status and standard error of a training of `long.py` that gets a signal once `after` is there."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "genkit", "train", "long.py", "--out", "long"]
    process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / after).exists():
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    return process.returncode, error


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_what_was_done(folder, number, status):
    text = MODEL.replace(", 60, ema=0.9", ", 100_000_000, ema=0.9")
    (folder / "long.py").write_text(text)
    returned, error = stopped(folder, number, after="long/log.jsonl")
    assert returned == status and "genkit train: interrupted after" in error and "Traceback" not in error
    meta, stored = gk.storage.RunFiles(folder / "long").inspect()
    assert stored.meta["steps"] > 0 and meta["num_steps"] == 100_000_000


def test_a_signal_before_the_first_step_ends_at_once(folder):
    """The loss takes ages to trace, in compiled code that does not look at signals; nothing can be lost."""
    text = MODEL.replace(
        "return jnp.mean(",
        "import hashlib; open('here', 'w'); hashlib.pbkdf2_hmac('md5', b'', b'', 10**9); return jnp.mean(",
    )
    (folder / "long.py").write_text(text)
    start = time.monotonic()
    returned, error = stopped(folder, signal.SIGINT, after="here")
    assert returned == 130 and error.endswith("genkit train: interrupted\n") and time.monotonic() - start < 30
