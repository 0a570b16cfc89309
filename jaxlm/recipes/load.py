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
from jaxlm.train.checkpoint import latest_step, load_params
from jaxlm.train.record import FILE
from jaxlm.typing import Params


class Loaded(NamedTuple):
    """A model ready to run, and where it came from."""

    cfg: DecoderConfig
    params: Params
    tokenizer: Tokenizer
    origin: str


def load_model(folder: str | Path, *, step: int | None = None, tokenizer: str | None = None) -> Loaded:
    """The model in a run's folder (its newest checkpoint, or that of `step`) or in a Hugging Face folder.

    tokenizer: in place of the one that the folder holds. Parameters that a run averaged (EMA) are the ones loaded.
    Raises ValueError if the folder is neither, or has no such checkpoint.
    """
    folder = Path(folder)
    if (folder / FILE).is_file():
        return _from_run(folder, step, tokenizer)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"{folder} is a Hugging Face folder, which has no steps: leave the step out")
        cfg, params = hf.load(folder)
        return Loaded(cfg, params, load_tokenizer(tokenizer or folder), str(folder))
    raise ValueError(f"{folder}: neither a run's folder (no {FILE}) nor a Hugging Face model's (no config.json)")


def _from_run(folder: Path, step: int | None, tokenizer: str | None) -> Loaded:
    record = json.loads((folder / FILE).read_text())["config"]
    if record.get("model") is None:
        raise ValueError(f"{folder / FILE} records no decoder, so there is nothing to generate with")
    cfg = to_dataclass(DecoderConfig, record["model"], "run.json: config.model")
    adapted = record.get("lora") and to_dataclass(LoraConfig, record["lora"], "run.json: config.lora")
    step = latest_step(folder / "checkpoints") if step is None else step
    if step is None:
        raise ValueError(f"{folder} has no checkpoint yet: train it first")
    spec = decoder.spec(cfg)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        specs.abstract(lora.lora_spec(spec, adapted) if adapted else spec),
    )
    ema = record["train"].get("ema_decay") is not None
    params = load_params(folder / "checkpoints", target, step=step, ema=ema)
    if adapted:
        params = lora.merge(_base(record, spec), params, adapted)
    return Loaded(cfg, params, load_tokenizer(tokenizer or folder / "tokenizer"), f"{folder} at step {step}")


def _base(record: dict[str, Any], spec: specs.Spec) -> Params:
    """What the adapters of a run were trained beside."""
    if record["init_from"] is None:
        return specs.init(jax.random.key(record["train"]["seed"]), spec)
    return load_model(record["init_from"]).params
