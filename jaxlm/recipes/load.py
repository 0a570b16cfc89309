"""A trained or imported model for use: from a run's folder or a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.models import decoder, hf, lora
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.lora import LoraConfig
from jaxlm.recipes.config import to_dataclass
from jaxlm.train.bucket import in_bucket, on_this_machine
from jaxlm.train.checkpoint import latest_step, load_params
from jaxlm.train.record import FILE, checkpoints_of
from jaxlm.typing import Params


class Loaded(NamedTuple):
    """A model ready to run, and where it came from."""

    cfg: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    origin: str


def load_model(folder: str | Path, *, step: int | None = None, tokenizer: str | None = None) -> Loaded:
    """The model in a run's folder (its newest checkpoint, or that of `step`) or in a Hugging Face folder.

    The run's folder may be one in a bucket, gs://…, see `jaxlm.train.bucket`.

    tokenizer: in place of the one that the folder holds. Parameters that a run averaged (EMA) are the ones loaded;
    adapters come merged into their base.
    Raises ValueError if the folder is neither, or has no such checkpoint.
    """
    if in_bucket(folder):
        with on_this_machine(folder) as copy:
            return load_model(copy, step=step, tokenizer=tokenizer)._replace(origin=str(folder))
    folder = Path(folder)
    if (folder / FILE).is_file():
        return _from_run(folder, step, tokenizer)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"{folder} is a Hugging Face folder, which has no steps: leave the step out")
        cfg, params = hf.load(folder)
        return Loaded(cfg, params, load_tokenizer(tokenizer or folder), str(folder))
    raise ValueError(f"{folder}: neither a run's folder (no {FILE}) nor a Hugging Face model's (no config.json)")


def load_config(folder: str | Path) -> DecoderConfig:
    """The config alone of the model in a run's folder or a Hugging Face folder."""
    folder = Path(folder)
    return _run_config(_record(folder)) if (folder / FILE).is_file() else hf.load_config(folder)


class Adapters(NamedTuple):
    """The adapters of a run, and what they were trained beside (None: random parameters of the run's seed)."""

    cfg: DecoderConfig
    lora: LoraConfig
    params: Params
    base: str | None
    origin: str


def load_adapters(folder: str | Path, *, step: int | None = None) -> Adapters:
    """The adapters of a run that trained some, not merged; ValueError if it did not."""
    record = _record(Path(folder))
    if not record.get("lora"):
        raise ValueError(f"{folder} trained all parameters and no adapters: load it as a model")
    cfg = _run_config(record)
    adapted = to_dataclass(LoraConfig, record["lora"], "run.json: config.lora")
    params, step = _checkpoint(Path(folder), lora.lora_spec(decoder.spec(cfg), adapted), record, step)
    return Adapters(cfg, adapted, params, record["init_from"], f"{folder} at step {step}")


def _from_run(folder: Path, step: int | None, tokenizer: str | None) -> Loaded:
    record = _record(folder)
    cfg = _run_config(record)
    spec = decoder.spec(cfg)
    if record.get("lora"):
        found = load_adapters(folder, step=step)
        params, origin = lora.merge(_base(record, spec), found.params, found.lora), found.origin
    else:
        params, step = _checkpoint(folder, spec, record, step)
        origin = f"{folder} at step {step}"
    return Loaded(cfg, params, load_tokenizer(tokenizer or folder / "tokenizer"), origin)


def _record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / FILE).read_text())["config"]
    if record.get("model") is None:
        raise ValueError(f"{folder / FILE} records no decoder, so there is nothing to generate with")
    return record


def _run_config(record: dict[str, Any]) -> DecoderConfig:
    return to_dataclass(DecoderConfig, record["model"], "run.json: config.model")


def _checkpoint(folder: Path, spec: specs.Spec, record: dict[str, Any], step: int | None) -> tuple[Params, int]:
    """The parameters (averaged, where the run averaged them) of a step, the newest for None, on one device."""
    checkpoints = checkpoints_of(folder)
    step = latest_step(checkpoints) if step is None else step
    if step is None:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), specs.abstract(spec))
    ema = record["train"].get("ema_decay") is not None
    return load_params(checkpoints, target, step=step, ema=ema), step


def _base(record: dict[str, Any], spec: specs.Spec) -> Params:
    """What the adapters of a run were trained beside."""
    if record["init_from"] is None:
        return specs.init(jax.random.key(record["train"]["seed"]), spec)
    return load_model(record["init_from"]).params
