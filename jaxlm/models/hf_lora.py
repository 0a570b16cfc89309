"""Adapter folders of Hugging Face's `peft`, both ways: adapter_config.json and adapter_model.safetensors, numpy alone.

The names follow from the table of `hf_names`. peft holds one pair per stored tensor. Where a family stores several
kernels fused (GPT-2's c_attn, Phi-3's qkv_proj and gate_up_proj), theirs side by side are a pair of n times the rank,
exactly, and its alpha keeps the scale:

    x [A_q A_k A_v] diag(B_q, B_k, B_v) = [x A_q B_q, x A_k B_k, x A_v B_v]

A kernel without an adapter has zeros there. Kernels that all have the same A (as after loading an adapter that peft
trained on the fused tensor) are stored at their own rank, with the one A.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from jaxlm.models import hf_config, hf_names
from jaxlm.models.config import DecoderConfig
from jaxlm.models.decoder import spec
from jaxlm.models.lora import KERNEL, A, B, LoraConfig, lora_spec
from jaxlm.models.spec import check, flatten
from jaxlm.typing import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_LISTED = 8

Json = Mapping[str, Any]
Pair = tuple[np.ndarray, np.ndarray]
"""A [L, in, rank] and B [L, rank, out] of one matrix, over all layers."""

# Fields that change nothing of what an adapter computes, or are read; any other must be off (null, false or empty).
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# Others (PiSSA, OLoRA, CorDA, LoftQ, …) change the base as well.
_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal")


class _Module(NamedTuple):
    """A linear module of the family: its name, with {i} for the layer, and our kernels that it holds side by side."""

    name: str
    groups: tuple[str, ...]

    def tensors(self, layer: int) -> tuple[str, str]:
        name = PREFIX + self.name.format(i=layer)
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"

    @property
    def pattern(self) -> str:
        """What names the module in every layer: self_attn.q_proj."""
        return self.name.split("{i}.")[1]


def _modules(family: str, cfg: DecoderConfig) -> list[_Module]:
    ending = f"/{KERNEL}"
    return [
        _Module(row.tensor.removesuffix(".weight"), tuple(path.removesuffix(ending) for path in row.paths))
        for row in hf_names.rows(family, cfg)
        if row.paths[0].endswith(ending)
    ]


def save(
    folder: str | Path,
    adapters: Params,
    lora: LoraConfig,
    cfg: DecoderConfig,
    *,
    family: str | None = None,
    base_model: str | None = None,
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained(base, folder)` and `load` read.

    adapters: of `lora_spec(decoder.spec(cfg), lora)`; stored in their own dtype. family: a model_type of Hugging Face
    (None: the plainest one that fits `cfg`). base_model: name or folder of the base, for the readers who look there.
    The folder appears in one rename, whole or not at all. Raises ValueError if it exists already, if the adapters are
    not those of `cfg` and `lora`, or if the family has no tensors for the model.
    """
    folder, family = Path(folder), family or hf_config.infer_family(cfg)
    if folder.exists():
        raise ValueError(f"{folder} exists: choose a new folder, or remove it first")
    check(adapters, lora_spec(spec(cfg), lora), what="adapters")
    pairs = _fused_pairs(adapters, lora, cfg, _modules(family, cfg))
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    temporary.mkdir(parents=True)
    try:
        config = _write_config(pairs, lora, family, base_model)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        save_file(dict(_stored(pairs)), temporary / TENSORS, metadata={"format": "pt"})
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fused_pairs(adapters: Params, lora: LoraConfig, cfg: DecoderConfig, modules: list[_Module]) -> dict[_Module, Pair]:
    flat = {path: np.asarray(jax.device_get(x)) for path, x in flatten(adapters).items()}
    dtype = next(iter(flat.values())).dtype
    shapes = _shapes(lora, cfg)

    def pair(group: str) -> Pair:
        a, b = (
            flat[f"{group}/{name}"] if f"{group}/{name}" in flat else np.zeros(shapes[f"{group}/{name}"], dtype)
            for name in (A, B)
        )
        return a.reshape(cfg.num_layers, -1, lora.rank), b.reshape(cfg.num_layers, lora.rank, -1)

    adapted = [m for m in modules if any(f"{group}/{A}" in flat for group in m.groups)]
    return {m: _fuse([pair(group) for group in m.groups]) for m in adapted}


def _shapes(lora: LoraConfig, cfg: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of every adapter that the model could have."""
    return {path: p.shape for path, p in flatten(lora_spec(spec(cfg), dataclasses.replace(lora, targets=None))).items()}


def _fuse(pairs: list[Pair]) -> Pair:
    """The pair of several matrices side by side: one A where it is the same for all, else A side by side."""
    if all(np.array_equal(a, pairs[0][0]) for a, _ in pairs):
        return pairs[0][0], np.concatenate([b for _, b in pairs], axis=2)
    rows = [
        np.concatenate([b if i == j else np.zeros((*b.shape[:2], other.shape[2]), b.dtype)
                        for j, (_, other) in enumerate(pairs)], axis=2)
        for i, (_, b) in enumerate(pairs)
    ]  # fmt: skip
    return np.concatenate([a for a, _ in pairs], axis=2), np.concatenate(rows, axis=1)


def _stored(pairs: Mapping[_Module, Pair]) -> Iterator[tuple[str, np.ndarray]]:
    """Names and tensors: A as [rank, in], B as [out, rank], of Conv1D modules too."""
    for module, pair in pairs.items():
        for layer in range(len(pair[0])):
            for name, stacked in zip(module.tensors(layer), pair):
                yield name, np.ascontiguousarray(stacked[layer].T)


def _write_config(
    pairs: Mapping[_Module, Pair], lora: LoraConfig, family: str, base_model: str | None
) -> dict[str, Any]:
    ranks = {module.pattern: a.shape[2] for module, (a, _) in pairs.items() if a.shape[2] != lora.rank}
    alphas = {pattern: _plain(lora.scale * (math.sqrt(r) if lora.rslora else r)) for pattern, r in ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "target_modules": [module.pattern for module in pairs],
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "bias": "none",
        "fan_in_fan_out": any(row.kind == "conv1d" for row in hf_names.TABLE[family]),
        "init_lora_weights": True,
    }


def _plain(x: float) -> float | int:
    """32.0 as the 32 that peft's own files have."""
    return round(x) if abs(x - round(x)) < 1e-12 * x else x


def load(
    folder: str | Path, cfg: DecoderConfig, *, family: str | None = None, dtype: Any = jnp.float32
) -> tuple[LoraConfig, Params]:
    """(config, adapters) of a peft folder for the base of `cfg`, strict on names and shapes.

    family: the model_type of the base (None: the plainest one that fits `cfg`). dtype: what the adapters are cast to;
    None keeps the file's. A pair that peft trained on a fused tensor becomes one of the same A for each of its kernels;
    their dropout is not carried over. Raises ValueError naming every missing, unexpected or misshapen tensor, and for
    what is no plain LoRA of one rank and one scale over linear modules: DoRA, trained biases or embeddings, some of
    the layers only, initialisations that change the base.
    """
    folder, family = Path(folder), family or hf_config.infer_family(cfg)
    config, files = _read(folder)
    lora = LoraConfig(config.get("r", 8), float(config.get("lora_alpha", 8)), rslora=bool(config.get("use_rslora")))
    modules = [m for m in _modules(family, cfg) if any(n in files for i in range(cfg.num_layers) for n in m.tensors(i))]
    _check_names(folder, files, modules, cfg, family)
    flat: dict[str, np.ndarray] = {}
    for module in modules:
        pair = _read_pair(folder, files, module, lora, cfg)
        for i in range(cfg.num_layers):
            _check_scale(folder, module.name.format(i=i), pair[0].shape[2], config, lora)
        for group, (a, b) in _split(folder, module, pair, lora, cfg).items():
            flat |= {f"{group}/{A}": a, f"{group}/{B}": b}
    shapes = _shapes(lora, cfg)
    targets = tuple(path.split("/")[-2] for path in shapes if path in flat and path.endswith(A))
    lora = dataclasses.replace(lora, targets=targets)
    placed = {path: jnp.asarray(x.reshape(shapes[path]), dtype) for path, x in flat.items()}
    adapters = traverse_util.unflatten_dict(placed, sep="/")
    check(adapters, lora_spec(spec(cfg), lora), what=f"the tensors of {folder}")
    return lora, adapters


def _read(folder: Path) -> tuple[Json, dict[str, np.ndarray]]:
    for file in (CONFIG, TENSORS):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: no {file}; expected the folder of a peft adapter, with safetensors")
    config = json.loads((folder / CONFIG).read_text())
    problems = [f"{name}={value!r}" for name, value in config.items() if value and name not in _KNOWN]
    for name, accepted in (("peft_type", ("LORA",)), ("bias", ("none", None)), ("init_lora_weights", _INITIALISERS)):
        if config.get(name) not in accepted:
            problems.append(f"{name}={config.get(name)!r}")
    if problems:
        raise ValueError(f"{folder}/{CONFIG}: expected a plain LoRA adapter, found {', '.join(problems)}")
    return config, load_file(folder / TENSORS)


def _check_names(
    folder: Path, files: Mapping[str, np.ndarray], modules: list[_Module], cfg: DecoderConfig, family: str
) -> None:
    wanted = {name for m in modules for i in range(cfg.num_layers) for name in m.tensors(i)}
    problems = [f"missing tensor {name}" for name in sorted(wanted - files.keys())]
    problems += [f"unexpected tensor {name}" for name in sorted(files.keys() - wanted)]
    if problems or not modules:
        more = [f"… and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
        raise ValueError(
            f"{folder} does not hold adapters of linear modules in all {cfg.num_layers} layers of a {family!r} model "
            "(another one? give its family):\n  " + "\n  ".join(problems[:MAX_LISTED] + more)
        )


def _read_pair(
    folder: Path, files: Mapping[str, np.ndarray], module: _Module, lora: LoraConfig, cfg: DecoderConfig
) -> Pair:
    size_in, sizes = _sizes(module, lora, cfg)
    rank = files[module.tensors(0)[0]].shape[0]
    for i in range(cfg.num_layers):
        for name, shape in zip(module.tensors(i), ((rank, size_in), (sum(sizes), rank))):
            if files[name].shape != shape:
                raise ValueError(f"{folder}: {name}: expected shape {shape}, found {files[name].shape}")
    a, b = (np.stack([files[module.tensors(i)[j]].T for i in range(cfg.num_layers)]) for j in (0, 1))
    return a, b


def _sizes(module: _Module, lora: LoraConfig, cfg: DecoderConfig) -> tuple[int, list[int]]:
    """The width of the module's input, and that of each of its kernels' outputs."""
    shapes = _shapes(lora, cfg)
    size_in = math.prod(shapes[f"{module.groups[0]}/{A}"][1:-1])
    return size_in, [math.prod(shapes[f"{group}/{B}"][2:]) for group in module.groups]


def _check_scale(folder: Path, name: str, rank: int, config: Json, lora: LoraConfig) -> None:
    """Raises ValueError unless the module of that name has the scale of all; patterns are matched as peft does."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alpha = next((x for key, x in patterns if re.match(rf"(.*\.)?({key})$", name)), lora.alpha)
    scale = dataclasses.replace(lora, rank=rank, alpha=float(alpha)).scale
    if not math.isclose(scale, lora.scale, rel_tol=1e-6):
        raise ValueError(
            f"{folder}: {name} has the scale {scale:g}, and alpha and rank of the whole adapter give {lora.scale:g}: "
            "expected one scale for all (alpha_pattern, rank_pattern)"
        )


def _split(folder: Path, module: _Module, pair: Pair, lora: LoraConfig, cfg: DecoderConfig) -> dict[str, Pair]:
    """The pair of each kernel in a module's pair: the inverse of `_fuse`."""
    (a, b), rank, num = pair, lora.rank, len(module.groups)
    columns = np.split(b, np.cumsum(_sizes(module, lora, cfg)[1])[:-1], axis=2)
    if a.shape[2] == rank:
        return {group: (a, part) for group, part in zip(module.groups, columns)}
    blocks = [(a[..., i : i + rank], part[:, i : i + rank]) for i, part in zip(range(0, num * rank, rank), columns)]
    if a.shape[2] != num * rank or np.count_nonzero(b) != sum(np.count_nonzero(block) for _, block in blocks):
        expected = f"{rank}" if num == 1 else f"{rank}, or {num * rank} with a separate block for each of {num} kernels"
        raise ValueError(f"{folder}: {module.name} has rank {a.shape[2]}: expected {expected}")
    return {group: block for group, block in zip(module.groups, blocks) if np.any(block[0])}
