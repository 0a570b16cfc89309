"""Language modelling: next-token pretraining, and supervised fine-tuning (the same loss under a completion mask).

`run` is the whole of it, top to bottom: tokenizer, data, model, mesh, objective, loop, report.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import jax

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.show import render_batch
from jaxlm.data.sources import describe
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.evals.compression import compressed_bpb
from jaxlm.generate.sample import SamplingConfig
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.config import to_dict
from jaxlm.recipes.describe import parameter_table
from jaxlm.recipes.wiring import (
    averaged,
    check_vocabulary,
    continuations,
    heldout_batches,
    initial_config,
    initial_params,
    make_apply,
    say,
    say_left_out,
    throughput,
)
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import check_batch, make_constrain, shard_batch
from jaxlm.sharding.rules import param_shardings
from jaxlm.train import flops
from jaxlm.train.config import TrainConfig
from jaxlm.train.evaluate import make_evaluate
from jaxlm.train.loop import Result, train
from jaxlm.train.objectives import make_hidden_nll, make_next_token_loss
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.plot import plot_run
from jaxlm.train.record import make_record
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import make_eval_step, make_train_step


@dataclasses.dataclass(frozen=True)
class Config:
    """A language-model run. What the groups hold is documented where they are defined.

    model: the decoder, or None with init_from, a Hugging Face or run folder whose parameters (and config) the run
    starts from. baselines: compressors whose bits per byte on the held-out text are printed and plotted beside the
    model's. sample_prompts: continued at the end by `sampling`.
    """

    run_dir: str
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    model: DecoderConfig | None = None
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    recipe: Literal["lm"] = "lm"
    baselines: tuple[Literal["zlib", "bz2", "lzma"], ...] = ()
    sample_prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()


def resolve(cfg: Config) -> Config:
    """Fills in the model from `init_from`; ValueError if neither is given."""
    if cfg.model is not None:
        return cfg
    if cfg.init_from is None:
        raise ValueError("config: give model (the decoder's fields) or init_from (a Hugging Face or run folder)")
    return dataclasses.replace(cfg, model=initial_config(cfg.init_from))


def run(cfg: Config) -> Result:
    """Trains, evaluates, and reports; started again on the same run folder, it resumes."""
    cfg = resolve(cfg)
    model, mesh, tokenizer = _model(cfg), make_mesh(cfg.mesh), load_tokenizer(cfg.data.tokenizer)
    check_batch(
        mesh,
        batch_size=cfg.data.batch_size,
        num_microbatches=cfg.train.num_microbatches,
        sequence_length=cfg.data.sequence_length,
    )
    check_vocabulary(model, tokenizer, cfg.data)
    data = pipeline.build(cfg.data, tokenizer, process_index=jax.process_index(), process_count=jax.process_count())
    data.train.require(cfg.train.num_steps)
    spec = decoder.spec(model)
    say(parameter_table(spec, param_shardings(spec, mesh)))
    say(render_batch(data.train.batch(0), tokenizer, rows=1))
    say_left_out(data)
    tokenizer.save(Path(cfg.run_dir) / "tokenizer")

    constrain = make_constrain(mesh)
    nll = make_hidden_nll(make_apply(model, constrain), partial(decoder.head, cfg=model), mesh=mesh)
    loss_fn = make_next_token_loss(nll, z_loss=cfg.train.z_loss)
    optimizer, schedule = make_optimizer(
        cfg.optim, num_steps=cfg.train.num_steps, decay_mask=specs.decay_mask(spec), spec=spec
    )
    ema = cfg.train.ema_decay is not None
    result = train(
        cfg.train,
        run_dir=cfg.run_dir,
        init_state=lambda: init_state(
            jax.random.key(cfg.train.seed), spec, optimizer, mesh=mesh, ema=ema, params=initial_params(cfg.init_from)
        ),
        abstract_state=abstract_state(spec, optimizer, mesh=mesh, ema=ema),
        train_step=make_train_step(
            loss_fn,
            optimizer,
            seed=cfg.train.seed,
            schedule=schedule,
            num_microbatches=cfg.train.num_microbatches,
            ema_decay=cfg.train.ema_decay,
            dropout=model.dropout > 0,
        ),
        batches=partial(data.train.batches, num_threads=cfg.data.num_threads),
        place=partial(shard_batch, mesh=mesh),
        evaluate=make_evaluate(
            make_eval_step(loss_fn),
            heldout_batches(cfg.data, data),
            place=partial(shard_batch, mesh=mesh),
            params_of=averaged,
        )
        if data.heldout
        else None,
        record=make_record(
            to_dict(cfg), mesh=mesh, data_fingerprint=data.fingerprint, flop_definition=flops.DEFINITION
        ),
        batch_indices=data.train.indices,
        throughput=throughput(cfg.data, model, spec, mesh),
        constants={f"data/{reason}": float(n) for reason, n in data.skipped.items()},
    )
    if jax.process_index() == 0:
        _report(cfg, result)
    for text in continuations(
        cfg.sample_prompts, averaged(result.state), model, cfg.sampling, tokenizer=tokenizer, constrain=constrain
    ):
        say(text)
    return result


def _model(cfg: Config) -> DecoderConfig:
    assert cfg.model is not None
    return cfg.model


def _report(cfg: Config, result: Result) -> None:
    """The model's held-out bits per byte beside the compressors', and the loss curve."""
    lines: dict[str, float] = {}
    for source in cfg.data.heldout:
        name = describe(source)
        bpb = result.metrics.get(f"{name}/bits_per_byte")
        if bpb is None:
            continue
        lines = {m: compressed_bpb(pipeline.texts(source), method=m) for m in cfg.baselines}
        others = "".join(f", {method} {value:.3f}" for method, value in lines.items())
        say(f"{name}: {bpb:.3f} bits per byte{others}")
    plot = plot_run(Path(cfg.run_dir) / "metrics.jsonl", Path(cfg.run_dir) / "loss.png", baselines=lines)
    say(f"loss curve: {plot}")
