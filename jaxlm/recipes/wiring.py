"""What every recipe that trains a decoder on text wires alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import eval_batches
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder, hf
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.load import load_model
from jaxlm.train import flops
from jaxlm.train.progress import Throughput
from jaxlm.train.record import FILE
from jaxlm.typing import Apply, Array, Constrain, Params


def say(text: str) -> None:
    """Prints on the first process, which speaks for all."""
    if jax.process_index() == 0:
        print(text, flush=True)


def say_left_out(data: pipeline.Datasets) -> None:
    """Says how many rows the data left out, and why."""
    if data.skipped:
        say("left out of the data: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(data.skipped.items())))


def averaged(state: Any) -> Params:
    """The parameters to evaluate and to keep: the moving average where there is one."""
    return state.params if state.ema is None else state.ema


def make_apply(model: DecoderConfig, constrain: Constrain) -> Apply:
    """The decoder as the trainer sees it: parameters and tokens in, hidden states out."""

    def apply(params: Params, tokens: Array, *, positions: Any, segments: Any, key: Any) -> Array:
        return decoder.forward(
            params, tokens, cfg=model, positions=positions, segments=segments, key=key, constrain=constrain
        ).hidden

    return apply


def initial_config(init_from: str) -> DecoderConfig:
    """The config of the model in a Hugging Face folder or a run's folder."""
    is_run = (Path(init_from) / FILE).is_file()
    return load_model(init_from).cfg if is_run else hf.load_config(init_from)


def initial_params(init_from: str | None) -> Params | None:
    """The parameters in a Hugging Face folder or a run's newest checkpoint; None for none."""
    if init_from is None:
        return None
    is_run = (Path(init_from) / FILE).is_file()
    return load_model(init_from).params if is_run else hf.load(init_from)[1]


def check_vocabulary(model: DecoderConfig, tokenizer: Tokenizer, data: DataConfig) -> None:
    """Raises ValueError unless the model has a row for every id and a position for every place."""
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {data.tokenizer!r} has {tokenizer.vocab_size} ids and the model only "
            f"vocab_size={model.vocab_size}: set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    if model.learned_positions and data.sequence_length > model.max_length:
        raise ValueError(
            f"data.sequence_length={data.sequence_length} exceeds the learned positions of the model "
            f"(max_length={model.max_length}): shorten the one or lengthen the other"
        )


def heldout_batches(cfg: DataConfig, data: pipeline.Datasets) -> dict[str, Any]:
    """Name -> function giving this host's batches of that held-out set."""
    size = cfg.eval_batch_size or cfg.batch_size
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    return {name: partial(eval_batches, rows, batch_size=size, **hosts) for name, rows in data.heldout.items()}


def throughput(cfg: DataConfig, model: DecoderConfig, spec: specs.Spec, mesh: jax.sharding.Mesh) -> Throughput:
    """What tokens/s and MFU are counted by."""
    per_token = flops.flops_per_token(
        spec,
        sequence_length=cfg.sequence_length,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
    )
    peak = flops.peak_flops()
    return Throughput(cfg.batch_size * cfg.sequence_length, per_token, None if peak is None else peak * mesh.size)


def continuations(
    prompts: Sequence[str],
    params: Params,
    model: DecoderConfig,
    sampling: SamplingConfig,
    *,
    tokenizer: Tokenizer,
    constrain: Constrain,
) -> Iterator[str]:
    """Every prompt with what the model writes after it, as text to print."""
    if prompts:
        for r in generate(params, prompts, cfg=model, sampling=sampling, tokenizer=tokenizer, constrain=constrain):
            yield f"--- {prompts[r.prompt]!r} continued\n{prompts[r.prompt]}{r.text}"
