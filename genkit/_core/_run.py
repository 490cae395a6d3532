"""Run folders: everything a training leaves on disk.

    definition.py   the definition file, word for word (absent for a recipe that came from no file)
    meta.json       versions, seed, steps, hash of the data, hashes of the needed runs
    state.gk        the checkpoint: model, optimizer states, moving average, log of every step
    log.jsonl       one line per compiled call
    needs/NAME/     the needed runs, copied

Only arrays and JSON; the one thing that can execute is the definition file.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ._files import CorruptFileError, Json, atomic_write, describe_kind, remove_leftovers
from ._fit_step import TrainState
from ._log import cut_log
from ._store import Stored, hash_tree, read_arrays, restore, save_arrays


DEFINITION, META, STATE, LOG, NEEDS = "definition.py", "meta.json", "state.gk", "log.jsonl", "needs"
_PACKAGES = ("genkit-jax", "jax", "jaxlib", "equinox", "optax", "numpyro", "numpy")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a recipe came from.

    Args:
        path: the definition file.
        text: its bytes.
        needs: the run folder behind each name that `build` takes.
    """

    path: str
    text: bytes
    needs: tuple[tuple[str, str], ...] = ()


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder that a training has written to."""
    return (Path(path) / META).is_file() or (Path(path) / STATE).is_file()


def read_meta(run: str | os.PathLike[str]) -> Json:
    """The facts of a run folder."""
    path = Path(run) / META
    if not path.is_file():
        raise FileNotFoundError(f"`{run}` is not a run folder: it has no {META} ({describe_kind(Path(run))}).")
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptFileError(path, f"it is not JSON ({error})") from None
    if not isinstance(meta, dict) or meta.get("format") != 1:
        raise CorruptFileError(path, "it does not say `format: 1`")
    return meta


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


def save_state(run: Path, state: TrainState, log: dict[str, np.ndarray], meta: Json) -> None:
    """Write the checkpoint of a run folder in one step."""
    save_arrays(run / STATE, {"state": state, "log": log}, meta={"steps": int(state.step), **meta})


def key_fact(key: jax.Array) -> Json:
    """A key in JSON, with the seed it was made of where that can be told."""
    data = np.asarray(jax.random.key_data(key)).ravel().tolist()
    seed = data[-1] if not any(data[:-1]) else None
    return {"impl": str(jax.random.key_impl(key)), "data": data, "seed": seed}


def start_run(run: Path, meta: Json, source: Source | None) -> None:
    """Create a run folder and everything in it that does not change during training."""
    run.mkdir(parents=True, exist_ok=True)
    # First of all what makes the folder a run: whatever comes next may be cut off, and is written again on resuming.
    atomic_write(run / META, json.dumps(meta, indent=2) + "\n")
    if source is not None:
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


def describe_run(recipe: Any, key: jax.Array, num_steps: int) -> Json:
    """The facts that `meta.json` records."""
    source = recipe.source
    needs = {}
    for name, folder in source.needs if source else ():
        needs[name] = {"path": str(folder), "sha256": hashlib.sha256((Path(folder) / STATE).read_bytes()).hexdigest()}
    key_facts = key_fact(key)
    return {
        "format": 1,
        "name": recipe.name,
        "definition": hashlib.sha256(source.text).hexdigest() if source else None,
        "definition_path": source.path if source else None,
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


def find_state(run: Path, meta: Json, *, resume: bool) -> Stored | None:
    """The checkpoint to resume from, or None to start anew.

    Args:
        run: the run folder, which need not exist.
        meta: the facts of the training that is about to start.
        resume: whether an earlier run may be continued.

    Returns:
        The verified checkpoint, or None where there is none.

    Raises:
        ValueError: if there is a run that may not be continued, or whose key, data, definition or needs differ.
    """
    if run.exists() and not run.is_dir():
        raise ValueError(f"`run` must be a folder; got `{run}`, which is {describe_kind(run)}.")
    if not is_run(run):
        if run.is_dir() and any(not path.name.endswith(".tmp") for path in run.iterdir()):
            raise ValueError(f"`run` must be a new or empty folder, or a run; got `{run}`, which holds other files.")
        _check_writable(run)
        return None
    if not resume:
        raise ValueError(f"`run` must be a new folder; got `{run}`, which holds a run. Pass `resume` to continue it.")
    _check_equal(run, read_meta(run), meta)
    stored = read_state(run) if (run / STATE).is_file() else None
    if jax.process_index() == 0:
        remove_leftovers(run)
        cut_log(run / LOG, 0 if stored is None else stored.meta["steps"])
    return stored


def _check_equal(run: Path, old: Json, new: Json) -> None:
    """Refuse to continue a run with another key, other data, another definition or other needs."""
    old_key, new_key = old["key"], new["key"]
    if (old_key["impl"], old_key["data"]) != (new_key["impl"], new_key["data"]):
        was, now = (k["seed"] if k["seed"] is not None else k["data"] for k in (old_key, new_key))
        raise ValueError(f"`key` must be the one `{run}` was started with (seed {was}); got seed {now}.")
    if old["definition"] != new["definition"] and old["definition"] is not None:
        raise ValueError(
            f"the definition file differs from the one `{run}` was started with, `{run / DEFINITION}`. "
            "Resume with that file, or train into a new folder."
        )
    if old["data"] != new["data"]:
        raise ValueError(f"`data` must be the data `{run}` was started with; their hashes differ.")
    for name, need in new["needs"].items():
        if old["needs"].get(name, {}).get("sha256") != need["sha256"]:
            raise ValueError(f"`{name}` must be the run `{run}` was started with; got `{need['path']}`, which differs.")


def _check_writable(run: Path) -> None:
    parent = run.absolute()
    while not parent.exists():
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise ValueError(f"`run` must be a folder that can be written; got `{run}`, and `{parent}` refuses.")
