"""Hugging Face checkpoints, both ways: safetensors (one file or sharded) and config.json, with numpy alone."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.models import hf_config, hf_names
from jaxlm.models.config import DecoderConfig
from jaxlm.models.decoder import spec
from jaxlm.models.spec import check, flatten
from jaxlm.typing import Array, Params

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_LISTED = 8


def load_config(folder: str | Path) -> DecoderConfig:
    """The decoder config of a Hugging Face folder; ValueError if it holds no config.json or an unsupported model."""
    return _read_config(Path(folder))[1]


def _read_config(folder: Path) -> tuple[str, DecoderConfig]:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no config.json; expected the folder of a Hugging Face model")
    return hf_config.read(json.loads(path.read_text()))


def load(folder: str | Path, *, dtype: Any = jnp.float32, shardings: Any = None) -> tuple[DecoderConfig, Params]:
    """(config, parameters) of a Hugging Face folder, strict on names and shapes.

    dtype: what the parameters are cast to; None keeps the file's. shardings: a tree of shardings like the parameters;
    each process then reads only the layers' tensors that its devices need, one at a time. Raises ValueError naming
    every missing, unexpected or misshapen tensor.
    """
    folder = Path(folder)
    family, cfg = _read_config(folder)
    files = _Tensors(folder)
    table = hf_names.rows(family, cfg)
    _check_names(files, table, cfg, folder)
    placed = {} if shardings is None else flatten(shardings)
    flat: dict[str, Array] = {}
    for path, param in flatten(spec(cfg)).items():
        row = next(r for r in table if path in r.paths)
        read = _reader(files, row, path, cfg, dtype)
        if path in placed:
            flat[path] = jax.make_array_from_callback(param.shape, placed[path], read)
        else:
            flat[path] = jnp.asarray(read((slice(None),) * len(param.shape)))
    params = _unflatten(flat)
    check(params, spec(cfg), what=f"the tensors of {folder}")
    return cfg, params


class _Tensors:
    """The tensors of a folder by name, read lazily; names without their family's prefix (old GPT-2) are found too."""

    def __init__(self, folder: Path) -> None:
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
        bare = name.removeprefix("transformer.")
        return name if name in self._where else bare if bare in self._where else None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        return self._where[name].get_tensor(name)


def _layer_shapes(row: hf_names.Row, cfg: DecoderConfig) -> list[tuple[int, ...]]:
    shapes = [flatten(spec(cfg))[p].shape for p in row.paths]
    return [s[1:] for s in shapes] if "{i}" in row.tensor else shapes


def _tensor_names(row: hf_names.Row, cfg: DecoderConfig) -> list[str]:
    return [row.tensor.format(i=i) for i in range(cfg.num_layers)] if "{i}" in row.tensor else [row.tensor]


def _check_names(files: _Tensors, table: list[hf_names.Row], cfg: DecoderConfig, folder: Path) -> None:
    problems, wanted = [], set()
    for row in table:
        shape = hf_names.tensor_shape(row, _layer_shapes(row, cfg))
        for name in _tensor_names(row, cfg):
            found = files.find(name)
            if found is None:
                problems.append(f"missing tensor {name}")
                continue
            wanted.add(found)
            if files.shape(found) != shape:
                problems.append(f"{name}: expected shape {shape}, found {files.shape(found)}")
    for name in sorted(files.names() - wanted):
        if name == "lm_head.weight" and cfg.tie_embeddings:
            # Some exporters store the tied head a second time: harmless if it is the same.
            if not np.array_equal(files.read(name), files.read(next(iter(_tied(files, table))))):
                problems.append(f"{name} differs from the embeddings, though config.json ties them")
        elif not name.endswith(hf_names.IGNORED_SUFFIXES):
            problems.append(f"unexpected tensor {name}")
    if problems:
        more = f"\n  … and {len(problems) - MAX_LISTED} more" if len(problems) > MAX_LISTED else ""
        raise ValueError(
            f"{folder} does not hold the model of its config.json:\n  " + "\n  ".join(problems[:MAX_LISTED]) + more
        )


def _tied(files: _Tensors, table: list[hf_names.Row]) -> Iterator[str]:
    for row in table:
        found = files.find(row.tensor) if row.paths == ("embed/table",) else None
        if found is not None:
            yield found


def _reader(
    files: _Tensors, row: hf_names.Row, path: str, cfg: DecoderConfig, dtype: Any
) -> Callable[[tuple[slice, ...]], np.ndarray]:
    """index -> that part of the parameter; of a stacked one, only the tensors of the layers in it are read."""
    shapes, which = _layer_shapes(row, cfg), row.paths.index(path)
    names = [files.find(name) or name for name in _tensor_names(row, cfg)]

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


def save(
    folder: str | Path,
    params: Params,
    cfg: DecoderConfig,
    *,
    family: str | None = None,
    dtype: Any = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: Any = None,
) -> None:
    """Writes a folder that transformers and `load` read: safetensors, config.json, and the tokenizer's files.

    family: a model_type of Hugging Face (None: the plainest one that fits). dtype: of the stored tensors (None: as the
    parameters are). tokenizer: anything with `save(folder)`. The folder appears in one rename, whole or not at all; it
    must not exist yet. Raises ValueError if it does, or if the family cannot express the config.
    """
    folder, family = Path(folder), family or hf_config.infer_family(cfg)
    if folder.exists():
        raise ValueError(f"{folder} exists: choose a new folder, or remove it first")
    check(params, spec(cfg))
    flat = {path: np.asarray(jax.device_get(x)) for path, x in flatten(params).items()}
    flat = flat if dtype is None else {path: x.astype(dtype) for path, x in flat.items()}
    stored = str(next(iter(flat.values())).dtype)
    config = hf_config.write(cfg, family, stored)
    # Families have default ids of their own, which may lie outside this vocabulary: say what holds here.
    config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id", None) for name in ("bos", "eos", "pad")}
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    temporary.mkdir(parents=True)
    try:
        _write_shards(temporary, _tensors(flat, family, cfg), max_shard_bytes)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save(temporary)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _tensors(flat: Mapping[str, np.ndarray], family: str, cfg: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    for row in hf_names.rows(family, cfg):
        for i, name in enumerate(_tensor_names(row, cfg)):
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
