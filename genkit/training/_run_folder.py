"""Run folders: everything a training leaves on disk.

    definition.py   the definition file, word for word (absent for a recipe that came from no file)
    meta.json       versions, seed, steps, hash of the data, hashes of the needed runs
    state.gk        the checkpoint: model, optimizer states, moving average, log of every step
    log.jsonl       one line per compiled call
    needs/NAME/     the needed runs, copied

Only arrays and JSON; the one thing that can execute is the definition file.
"""

import datetime
import hashlib
import importlib.metadata
import os
import platform
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from genkit.storage import (
    Json,
    RunFiles,
    Stored,
    atomic_write,
    check_writable,
    describe_kind,
    hash_tree,
    is_run,
    read_arrays,
    read_meta,
    remove_leftovers,
    restore,
    same_program,
    save_arrays,
    write_meta,
)
from genkit.training._log import cut_log
from genkit.training._recipe import Recipe, Source
from genkit.training._step import TrainState


DEFINITION = "definition.py"
META = "meta.json"
STATE = "state.gk"
LOG = "log.jsonl"
NEEDS = "needs"
_PACKAGES = ("genkit-jax", "jax", "jaxlib", "equinox", "optax", "numpyro", "numpy")


def read_state(run: str | os.PathLike[str], *, header_only: bool = False) -> Stored:
    """The verified checkpoint of a run folder."""
    path = Path(run) / STATE
    if not Path(run).is_dir():
        raise FileNotFoundError(f"no run folder at `{run}` ({describe_kind(Path(run))}).")
    if not path.is_file():
        raise FileNotFoundError(f"`{run}` holds no checkpoint yet: it has no {STATE}.")
    return read_arrays(path, header_only=header_only)


def stored_log(stored: Stored) -> dict[str, np.ndarray]:
    """The log of every step in a checkpoint."""
    names = {path: path[len("['log']['") : -len("']")] for path in stored.leaves if path.startswith("['log']")}
    return {name: np.asarray(stored.leaves[path]) for path, name in names.items()}


def stored_state(stored: Stored, like: TrainState) -> TrainState:
    """The training state in a checkpoint, which must have the structure of `like`."""
    return restore(stored, like, "['state']")


def stored_final(stored: Stored, like: TrainState) -> PyTree | None:
    """The model as the hooks at the end of the training left it; None where there were none."""
    if not any(path.startswith("['final']") for path in stored.leaves):
        return None
    return restore(stored, like.model, "['final']")


def save_state(run: Path, state: TrainState, final: PyTree | None, log: dict[str, np.ndarray], meta: Json) -> None:
    """Write the checkpoint of a run folder in one step."""
    content = {"state": state, "log": log}
    if final is not None:
        content["final"] = final
    save_arrays(run / STATE, content, meta={"steps": int(state.step), **meta})


def key_fact(key: jax.Array) -> Json:
    """A key in JSON, with the seed it was made of where that can be told."""
    data = np.asarray(jax.random.key_data(key)).ravel().tolist()
    seed = None
    if not any(data[:-1]):
        seed = data[-1]
    return {"impl": str(jax.random.key_impl(key)), "data": data, "seed": seed}


def start_run(run: Path, meta: Json, source: Source | None) -> None:
    """Create a run folder and everything in it that does not change during training."""
    run.mkdir(parents=True, exist_ok=True)
    # First of all what makes the folder a run: whatever comes next may be cut off, and is written again on resuming.
    write_meta(run, _with_history(run, meta))
    if source is not None:
        # On resuming, the file may differ in comments: the copy stays the one that the hash is of.
        if not (run / DEFINITION).is_file():
            atomic_write(run / DEFINITION, source.text)
        for name, folder in source.needs:
            _copy_need(Path(folder), run / NEEDS / name)


def _copy_need(source: Path, target: Path) -> None:
    """Copy what it takes to load a run: not its log, nor anything else that stands in its folder."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (DEFINITION, META, STATE):
        atomic_write(target / name, (source / name).read_bytes())
    if (source / NEEDS).is_dir():
        shutil.copytree(source / NEEDS, target / NEEDS, dirs_exist_ok=True)


def describe_run(recipe: Recipe, key: jax.Array, num_steps: int) -> Json:
    """The facts that `meta.json` records."""
    source = recipe.source
    definition = None
    definition_path = None
    needs = {}
    if source is not None:
        definition = hashlib.sha256(source.text).hexdigest()
        definition_path = source.path
        for name, folder in source.needs:
            digest = hashlib.sha256((Path(folder) / STATE).read_bytes()).hexdigest()
            needs[name] = {"path": str(folder), "sha256": digest}
    key_facts = key_fact(key)
    return {
        "name": recipe.name,
        "definition": definition,
        "definition_path": definition_path,
        "seed": key_facts["seed"],
        "key": key_facts,
        "num_steps": num_steps,
        "data": hash_tree(recipe.data),
        "needs": needs,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_state(run: Path, meta: Json, source: Source | None, *, resume: bool) -> Stored | None:
    """The checkpoint to resume from, or None to start anew.

    Args:
        run: the run folder, which need not exist.
        meta: the facts of the training that is about to start.
        source: the definition file of that training.
        resume: whether an earlier run may be continued.

    Returns:
        The verified checkpoint, or None where there is none.

    Raises:
        ValueError: if there is a run that may not be continued, or whose key, data, definition or needs differ.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"`run` must be a folder; got `{run}`, which is {describe_kind(run)}.")
    if not is_run(run):
        if run.is_dir() and any(path.name != ".lock" and path.suffix != ".tmp" for path in run.iterdir()):
            raise ValueError(f"`run` must be a new or empty folder, or a run; got `{run}`, which holds other files.")
        check_writable(run, "run")
        return None
    if not resume:
        raise ValueError(f"`run` must be a new folder; got `{run}`, which holds a run. Pass `resume` to continue it.")
    old = read_meta(run)
    _check_equal(run, old, meta, source)
    stored = None
    steps = 0
    if (run / STATE).is_file():
        stored = read_state(run)
        RunFiles(run).check_state(stored, old)
        steps = stored.meta["steps"]
    _warn_of_versions(run, old, meta)
    if jax.process_index() == 0:
        remove_leftovers(run)
        cut_log(run / LOG, steps)
    return stored


def _check_equal(run: Path, old: Json, new: Json, source: Source | None) -> None:
    """Refuse to continue a run with another key, other data, another definition or other needs."""
    old_key = old["key"]
    new_key = new["key"]
    if (old_key["impl"], old_key["data"]) != (new_key["impl"], new_key["data"]):
        raise ValueError(
            f"`key` must be the one `{run}` was started with (seed {_seed(old_key)}); got seed {_seed(new_key)}."
        )
    if old["definition"] is not None and not _same_definition(RunFiles(run).definition, source):
        raise ValueError(
            f"the definition file differs from the one `{run}` was started with, `{run / DEFINITION}`. "
            "Resume with that file, or train into a new folder."
        )
    if old["data"] != new["data"]:
        raise ValueError(f"`data` must be the data `{run}` was started with; their hashes differ.")
    for name, need in new["needs"].items():
        if old["needs"].get(name, {}).get("sha256") != need["sha256"]:
            raise ValueError(f"`{name}` must be the run `{run}` was started with; got `{need['path']}`, which differs.")


def _seed(key: Json) -> int | list[int]:
    """The seed of a recorded key, or its data where it was not made from a seed."""
    if key["seed"] is not None:
        return key["seed"]
    return key["data"]


def _same_definition(kept: Path, source: Source | None) -> bool:
    """True if the run's copy of its definition file is the given one, but for comments and layout."""
    # A run that was cut off before its first checkpoint may lack the copy; it is written again.
    if not kept.is_file():
        return True
    return source is not None and same_program(kept.read_bytes(), source.text)


def _warn_of_versions(run: Path, old: Json, new: Json) -> None:
    """Say which libraries changed since the run was started: its bits may differ from those of an unbroken run."""
    before = old.get("versions", {})
    changed = [
        f"{name} {before[name]} -> {now}" for name, now in new["versions"].items() if before.get(name, now) != now
    ]
    if changed:
        warnings.warn(
            f"`{run}` was started with other versions ({', '.join(changed)}): results may differ in the last digits.",
            stacklevel=5,
        )


def _with_history(run: Path, meta: Json) -> Json:
    """The facts to record: those of the first start, and when and with which versions the run was resumed."""
    if not RunFiles(run).meta.is_file():
        return meta
    first = read_meta(run)
    resumed = [*first.get("resumed", []), {"at": meta["created"], "versions": meta["versions"]}]
    kept = ("created", "python", "device", "versions", "definition", "definition_path")
    return {**meta, **{name: first[name] for name in kept}, "resumed": resumed}
