"""Checkpoints: saved in the background, atomic, checked leaf by leaf on the way back. The only file that knows Orbax.

    <directory>/<step>/params, ema, opt_state, counters    one folder per part, so that parameters load without the rest
    <directory>/<step>/_CHECKPOINT_METADATA                JSON: the caller's record, metrics, and the manifest

Orbax writes into a temporary folder and renames it when it is whole, so a step that is listed is complete whenever the
process is killed. Two things it does not do are done here. It casts a leaf to the dtype that is asked for without a
word: the manifest records path, shape and dtype of every leaf, and a difference is an error. It stores array data
without a checksum, so that a damaged byte would load as another number: the manifest holds a checksum per leaf,
computed on the devices, equal on any mesh.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxlm.train.bucket import folder as open_folder
from jaxlm.train.bucket import in_bucket
from jaxlm.train.manifest import MAX_LISTED, check, make_manifest
from jaxlm.train.memory import rss_bytes
from jaxlm.typing import Params

State = TypeVar("State")

_log = logging.getLogger(__name__)
_DELETED = ".deleted"
_DAMAGED = ".damaged"
_METADATA = "_CHECKPOINT_METADATA"
_TEMPORARY = ".orbax-checkpoint-tmp"


class Checkpoints:
    """Saves the states of one run and keeps the last few and the best.

    directory: a local path, or a bucket's, gs://…; keep_last: how many of the newest steps to keep, >= 1;
    best_metric: name in the metrics given to `save` whose best step is kept too (None: no best); best_mode: whether
    the lowest or the highest value is best. beside: called in the background at every save, which fails if it does.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep_last: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        beside: Callable[[], None] | None = None,
    ) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last: expected at least 1, found {keep_last} (a run resumes the newest)")
        self._directory = open_folder(directory)
        self._keep_last = keep_last
        self._best_metric = best_metric
        self._sign = {"min": 1.0, "max": -1.0}[best_mode]
        self._beside = beside
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._scores: dict[int, float | None] = {}
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._sweep()
        for step in all_steps(self._directory):
            self._scores[step] = self._score(load_record(self._directory, step)["metrics"])

    def save(
        self,
        step: int,
        state: Any,
        *,
        record: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving `state` (a dataclass of arrays) as `step`, and returns once its arrays may be overwritten.

        record: JSON values to find the run again (config, seed, versions); metrics: of this very step, for keeping the
        best. Waits for the save before it, so that at most one copy of the state is held in host memory; raises what
        that one failed with.
        """
        self.wait()
        before, start = rss_bytes(), time.perf_counter()
        parts = _parts(state)
        metadata: dict[str, Any] = {
            "step": step,
            "record": dict(record or {}),
            "metrics": dict(metrics or {}),
            "manifest": make_manifest(parts),
        }
        path = self._directory / str(step)
        if _is_whole(path):
            raise ValueError(f"checkpoint {path} is already there; a step is saved once")
        # overwrite: what stands there is half of a save that was killed (in a bucket there is no rename to hide it).
        with _context():
            response = ocp.save_checkpointables_async(path, parts, overwrite=True, custom_metadata=metadata)
        _log.info(
            "step %d: copied to host in %.2f s, rss %.2f GB before and %.2f GB after",
            *(step, time.perf_counter() - start, before / 1e9, rss_bytes() / 1e9),
        )
        self._pending = self._thread.submit(self._finish, step, response, self._score(metadata["metrics"]), start)

    def raise_if_failed(self) -> None:
        """Raises what the save in the background failed with, if it has; returns at once while it is under way."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being saved; raises what the save failed with."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise RuntimeError(f"a checkpoint could not be saved under {self._directory}: {error}") from error

    def close(self) -> None:
        """Finishes the save under way."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """The steps that are saved whole, ascending."""
        return all_steps(self._directory)

    def _finish(self, step: int, response: ocp.AsyncResponse[Any], score: float | None, start: float) -> None:
        if self._beside is not None:
            self._beside()
        response.result()
        self._scores[step] = score
        seconds = time.perf_counter() - start
        _log.info("step %d: saved %.2f s after it began, rss %.2f GB", step, seconds, rss_bytes() / 1e9)
        if jax.process_index() == 0:
            for old in expired(self._scores, keep_last=self._keep_last):
                self._delete(old)
                del self._scores[old]

    def _score(self, metrics: Mapping[str, float]) -> float | None:
        """The best metric with its sign turned so that less is better."""
        if self._best_metric is None or self._best_metric not in metrics:
            return None
        return self._sign * metrics[self._best_metric]

    def _delete(self, step: int) -> None:
        # Renamed first: a kill in the middle must not leave half a step that counts as whole.
        _rename(self._directory / str(step), _DELETED).rmtree()

    def _sweep(self) -> None:
        for path in _children(self._directory):
            half = _TEMPORARY in path.name or _is_half_in_bucket(path)
            if half:
                _log.warning("step %s was half written when the run was stopped: removed", path.name.split(".")[0])
            if half or path.name.endswith(_DELETED):
                path.rmtree()


def expired(scores: Mapping[int, float | None], *, keep_last: int) -> list[int]:
    """The steps to delete: all but the newest `keep_last` and the one with the least score (None: not scored).

    >>> expired({10: 3.0, 20: 1.0, 30: 2.0, 40: None}, keep_last=2)
    [10]
    """
    scored = [step for step in sorted(scores) if scores[step] is not None]
    best = min(scored, key=lambda step: scores[step] or 0.0, default=None)
    newest = sorted(scores)[-keep_last:]
    return [step for step in sorted(scores) if step not in newest and step != best]


def all_steps(directory: str | os.PathLike[str]) -> list[int]:
    """The steps saved whole under `directory`, ascending; empty where there is no such folder."""
    folder = open_folder(directory)
    return sorted(int(path.name) for path in _children(folder) if path.name.isdigit() and _is_whole(path))


def _children(folder: epath.Path) -> list[epath.Path]:
    return list(folder.iterdir()) if folder.exists() else []  # a bucket has no empty folders


def _is_whole(path: epath.Path) -> bool:
    # Orbax knows its temporary folders and commit markers, but takes an empty folder for a checkpoint.
    return (path / _METADATA).exists() and ocp.is_orbax_checkpoint(path)


def _is_half_in_bucket(path: epath.Path) -> bool:
    if not in_bucket(path) or not path.name.isdigit():  # elsewhere, half of a save has a temporary name
        return False
    return not _is_whole(path) and not (path / f"{_METADATA}{_DAMAGED}").exists()


def _rename(path: epath.Path, suffix: str) -> epath.Path:
    """Gives a step a name under which it does not count; in a bucket, where that copies every byte, its metadata."""
    if not in_bucket(path):
        return path.rename(path.with_name(f"{path.name}{suffix}"))
    metadata = path / _METADATA
    (path / f"{_METADATA}{suffix}").write_bytes(metadata.read_bytes())
    metadata.unlink()
    return path


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest step saved whole under `directory`; None if there is none."""
    return max(all_steps(directory), default=None)


def best_step(directory: str | os.PathLike[str], metric: str | None, mode: Literal["min", "max"]) -> int:
    """The saved step that is best by a metric (of equal ones the first), or the newest for None.

    Raises ValueError if no step has the metric. On several processes, ask on one: the others may still find steps that
    are about to be deleted.
    """
    steps = all_steps(directory)
    if metric is None:
        scores = {step: float(step) for step in steps}
    else:
        found = {step: load_record(directory, step)["metrics"] for step in steps}
        sign = {"min": -1.0, "max": 1.0}[mode]
        scores = {step: sign * found[step][metric] for step in steps if metric in found[step]}
    if not scores:
        raise ValueError(f"{open_folder(directory)}: no checkpoint" + ("" if metric is None else f" has {metric!r}"))
    return max(scores, key=lambda step: scores[step])


def load_record(directory: str | os.PathLike[str], step: int) -> dict[str, Any]:
    """What was saved beside the arrays: dict(step, record, metrics, manifest)."""
    path = open_folder(directory) / str(step)
    try:
        metadata = ocp.checkpointables_metadata(path).custom_metadata or {}
        return {name: metadata[name] for name in ("step", "record", "metrics", "manifest")}
    except Exception as error:
        raise _damaged(path, "its metadata cannot be read") from error


def load_state(directory: str | os.PathLike[str], target: State, *, step: int | None = None) -> State:
    """The saved state, laid out as `target`: its tree, shapes and dtypes exactly, placed by its shardings.

    target: a dataclass of `jax.ShapeDtypeStruct` (or arrays) with shardings, of any mesh; a leaf without one goes to
    the first device. step: None takes the newest. Raises ValueError naming every leaf that is missing, not expected,
    or of another shape or dtype, and if the checkpoint is damaged.
    """
    parts = _load(_step_path(directory, step), _parts(target), whole=True)
    filled = {field.name: getattr(target, field.name) for field in dataclasses.fields(target)}  # type: ignore[arg-type]
    filled |= {**parts, **parts.get("counters", {})}
    return dataclasses.replace(target, **{k: v for k, v in filled.items() if k != "counters"})  # type: ignore[type-var]


class Newest(NamedTuple):
    """A checkpoint to go on from: its step, what was saved beside its arrays, and the state. set_aside: newer ones that
    were damaged, each with what was found and where it lies now."""

    step: int
    saved: dict[str, Any]
    state: Any
    set_aside: list[str]


def load_newest(
    directory: str | os.PathLike[str], target: Any, *, check: Callable[[dict[str, Any]], None]
) -> Newest | None:
    """The newest checkpoint that can be read and whose checksums hold; None where no step is saved.

    check: told what `load_record` gives before the arrays are read, to raise if it is of another run. Damaged ones that
    are newer are renamed to <step>.damaged (in a bucket, their metadata is) once an older one is read. Where none can
    be read, all stay, and the error of the newest is raised. On several processes a step counts if all can read it.
    """
    damaged: dict[int, DamagedError] = {}
    for step in reversed(all_steps(directory)):
        saved: dict[str, Any] = {}
        state, error = None, None
        try:
            saved = load_record(directory, step)
            check(saved)
            state = load_state(directory, target, step=step)
        except DamagedError as found:
            error = found
        if np.all(multihost_utils.process_allgather(np.array(error is None))):
            return Newest(step, saved, state, _set_aside(open_folder(directory), damaged))
        damaged[step] = error or _damaged(_step_path(directory, step), "another process cannot read it")
    if damaged:
        raise damaged[max(damaged)]
    return None


def _set_aside(folder: epath.Path, damaged: Mapping[int, DamagedError]) -> list[str]:
    told = []
    for step, error in damaged.items():
        path, aside = folder / str(step), folder / f"{step}{_DAMAGED}"
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            _rename(path, _DAMAGED)
        told.append(f"checkpoint {path} is damaged ({error.what}) and is set aside with the suffix {_DAMAGED}")
    multihost_utils.sync_global_devices("damaged checkpoints are set aside")
    return told


def load_params(
    directory: str | os.PathLike[str], target: Params, *, step: int | None = None, ema: bool = False
) -> Params:
    """Only the parameters (or their moving average) of a saved state, strictly as `load_state`; reads nothing else."""
    part = "ema" if ema else "params"
    return _load(_step_path(directory, step), {part: target}, whole=False)[part]


def _load(path: epath.Path, targets: dict[str, Any], *, whole: bool) -> dict[str, Any]:
    manifest = load_record(path.parent, int(path.name))["manifest"]
    if not whole:
        manifest = {name: leaf for name, leaf in manifest.items() if name.split("/")[0] in targets}
    check(manifest, targets, where=f"checkpoint {path}")
    try:
        loaded = ocp.load_checkpointables(path, jax.tree.map(_placed, targets))
    except Exception as error:
        raise _damaged(path, "its arrays cannot be read") from error
    found = make_manifest(loaded)
    damaged = [name for name in found if found[name]["checksum"] != manifest[name]["checksum"]]
    if damaged:
        raise _damaged(path, f"the checksum differs in {', '.join(damaged[:MAX_LISTED])}")
    return loaded


def _parts(state: Any) -> dict[str, Any]:
    """The fields of a dataclass that are trees, each by its name, and its bare arrays together as `counters`."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    fields = {name: value for name, value in fields.items() if jax.tree.leaves(value)}
    counters = {name: value for name, value in fields.items() if jax.tree.leaves(value)[0] is value}
    trees = {name: value for name, value in fields.items() if name not in counters}
    return trees | ({"counters": counters} if counters else {})


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _step_path(directory: str | os.PathLike[str], step: int | None) -> epath.Path:
    folder, steps = open_folder(directory), all_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"{folder}: expected a checkpoint{'' if step is None else f' of step {step}'}, found {steps}")
    return folder / str(max(steps) if step is None else step)


def _context() -> ocp.Context:
    # In the background, a folder that cannot be made would be waited for over five minutes before the save fails.
    context = ocp.Context()
    context.asynchronous.create_directories_asynchronously = False
    return context


class DamagedError(ValueError):
    """A checkpoint whose files are not what was saved; `what` says in what."""

    what: str = ""


def _damaged(path: epath.Path, what: str) -> DamagedError:
    others: Sequence[int] = [step for step in all_steps(path.parent) if str(step) != path.name]
    error = DamagedError(
        f"checkpoint {path} is damaged: {what}. Move that folder away to go on from an earlier step "
        f"(whole ones there: {list(others) or 'none'})"
    )
    error.what = what
    return error
