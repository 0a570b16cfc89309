"""Safetensors of a Hugging Face folder to a parameter tree and back, by a table of names: one file, or shards."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.models import hf_names
from jaxlm.models.spec import Spec, check, flatten
from jaxlm.typing import Array, Params

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_LISTED = 8


class Layout(NamedTuple):
    """How a model lies in its folder. prefixes: what some files put before every name. ignored: beginnings of names
    that are no part of the model (heads of other tasks). copies: tensors that some files store a second time (a tied
    head), and the parameters that they must equal."""

    spec: Spec
    rows: list[hf_names.Row]
    num_layers: int
    prefixes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    copies: Mapping[str, str] = {}


def read(folder: Path, layout: Layout, *, dtype: Any, shardings: Any) -> Params:
    """The parameters of a folder, strict on names and shapes; see `jaxlm.models.hf.load`."""
    files = Tensors(folder, layout.prefixes)
    _check_names(files, layout, folder)
    placed = {} if shardings is None else flatten(shardings)
    flat: dict[str, Array] = {}
    for path, param in flatten(layout.spec).items():
        row = next(r for r in layout.rows if path in r.paths)
        part = _reader(files, row, path, layout, dtype)
        if path in placed:
            flat[path] = jax.make_array_from_callback(param.shape, placed[path], part)
        else:
            flat[path] = jnp.asarray(part((slice(None),) * len(param.shape)))
    params = _unflatten(flat)
    check(params, layout.spec, what=f"the tensors of {folder}")
    return params


def write(
    folder: Path,
    params: Params,
    layout: Layout,
    config: Callable[[str], Mapping[str, Any]],
    *,
    dtype: Any,
    max_shard_bytes: int,
    tokenizer: Any,
) -> None:
    """Writes the folder in one rename, whole or not at all. config: the stored dtype's name -> config.json."""
    if folder.exists():
        raise ValueError(f"{folder} exists: choose a new folder, or remove it first")
    check(params, layout.spec)
    flat = {path: np.asarray(jax.device_get(x)) for path, x in flatten(params).items()}
    flat = flat if dtype is None else {path: x.astype(dtype) for path, x in flat.items()}
    written = config(str(next(iter(flat.values())).dtype))
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, _tensors(flat, layout), max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


# What checkpoints that were once TensorFlow's (bert-base-uncased) call the two parameters of a LayerNorm.
OLDER_NAMES = ((".LayerNorm.weight", ".LayerNorm.gamma"), (".LayerNorm.bias", ".LayerNorm.beta"))


class Tensors:
    """The tensors of a folder by name, read lazily; names without their family's prefix, and older ones, are found."""

    def __init__(self, folder: Path, prefixes: tuple[str, ...]) -> None:
        self._prefixes = prefixes
        if (folder / INDEX).is_file():
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise ValueError(f"{folder}: neither {SINGLE} nor {INDEX}; convert other formats to safetensors first")
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise ValueError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}")
        self._open = [safe_open(folder / f, framework="np") for f in files]
        self._where = {name: f for f in self._open for name in f.keys()}  # noqa: SIM118  (not a dict)

    def names(self) -> set[str]:
        return set(self._where)

    def find(self, name: str) -> str | None:
        bare = next((name.removeprefix(p) for p in self._prefixes if name.startswith(p)), name)
        names = [name, bare, *(p + name for p in self._prefixes)]
        names += [n.replace(new, old) for n in names for new, old in OLDER_NAMES if n.endswith(new)]
        return next((n for n in names if n in self._where), None)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)


def _layer_shapes(row: hf_names.Row, layout: Layout) -> list[tuple[int, ...]]:
    shapes = [flatten(layout.spec)[p].shape for p in row.paths]
    return [s[1:] for s in shapes] if "{i}" in row.tensor else shapes


def _check_names(files: Tensors, layout: Layout, folder: Path) -> None:
    problems, wanted = [], set()
    for row in layout.rows:
        shape = hf_names.tensor_shape(row, _layer_shapes(row, layout))
        for name in row.names(layout.num_layers):
            found = files.find(name)
            if found is None:
                problems.append(f"missing tensor {name}")
                continue
            wanted.add(found)
            if files.shape(found) != shape:
                problems.append(f"{name}: expected shape {shape}, found {files.shape(found)}")
    for name in sorted(files.names() - wanted):
        if name in layout.copies:
            row = next(row for row in layout.rows if row.paths == (layout.copies[name],))
            found = files.find(row.tensor)
            if found is not None and not np.array_equal(files.read(name), files.read(found)):
                problems.append(f"{name} differs from {found}, though config.json ties them")
        elif not name.endswith(hf_names.IGNORED_SUFFIXES) and not name.startswith(layout.ignored):
            problems.append(f"unexpected tensor {name}")
    if problems:
        more = f"\n  … and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ValueError(
            f"{folder} does not hold the model of its config.json:\n  " + "\n  ".join(problems[:MAX_LISTED]) + more
        )


def _reader(
    files: Tensors, row: hf_names.Row, path: str, layout: Layout, dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """index -> that part of the parameter; of a stacked one, only the tensors of the layers in it are read."""
    shapes, which = _layer_shapes(row, layout), row.paths.index(path)
    names = [files.find(name) or name for name in row.names(layout.num_layers)]

    def one(name: str, index: tuple[slice, ...]) -> np.ndarray:
        part = hf_names.from_tensor(row, files.read(name), shapes)[which][index]
        return part if dtype is None else part.astype(dtype)

    def read(index: tuple[slice, ...]) -> np.ndarray:
        if "{i}" not in row.tensor:
            return np.ascontiguousarray(one(names[0], index))
        return np.stack([one(name, index[1:]) for name in names[index[0]]])

    return read


def _unflatten(flat: Mapping[str, Array]) -> Params:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *groups, leaf = path.split("/")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def _tensors(flat: Mapping[str, np.ndarray], layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    for row in layout.rows:
        for i, name in enumerate(row.names(layout.num_layers)):
            parts = [flat[p][i] if "{i}" in row.tensor else flat[p] for p in row.paths]
            yield name, np.ascontiguousarray(hf_names.to_tensor(row, parts))


def _write_shards(folder: Path, tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int) -> None:
    """One file, or numbered ones with an index; at most `max_bytes` each unless a single tensor is larger."""
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(names, shards):
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards) for name in shard}
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"
        )
