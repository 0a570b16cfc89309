"""Language modelling: next-token pretraining, and supervised fine-tuning (the same loss under a completion mask).

`run` is the whole of it, top to bottom: tokenizer, data, model, mesh, objective, loop, report.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import eval_batches
from jaxlm.data.show import render_batch
from jaxlm.data.sources import describe
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.evals.compression import compressed_bpb
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder, hf
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.config import to_dict
from jaxlm.recipes.describe import parameter_table
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
from jaxlm.train.progress import Throughput
from jaxlm.train.record import make_record
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import make_eval_step, make_train_step
from jaxlm.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """A language-model run. What the groups hold is documented where they are defined.

    model: the decoder, or None with init_from, a Hugging Face folder whose parameters (and config) the run starts
    from. baselines: compressors whose bits per byte on the held-out text are printed and plotted beside the model's.
    sample_prompts: continued at the end by `sampling`.
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
        raise ValueError("config: give model (the decoder's fields) or init_from (a Hugging Face folder)")
    return dataclasses.replace(cfg, model=hf.load_config(cfg.init_from))


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
    _check_vocabulary(model, tokenizer, cfg)
    data = pipeline.build(cfg.data, tokenizer, process_index=jax.process_index(), process_count=jax.process_count())
    data.train.require(cfg.train.num_steps)
    spec = decoder.spec(model)
    say(parameter_table(spec, param_shardings(spec, mesh)))
    say(render_batch(data.train.batch(0), tokenizer, rows=1))
    if data.skipped:
        say("left out of the data: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(data.skipped.items())))
    tokenizer.save(Path(cfg.run_dir) / "tokenizer")

    constrain = make_constrain(mesh)
    nll = make_hidden_nll(_apply(model, constrain), partial(decoder.head, cfg=model), mesh=mesh)
    loss_fn = make_next_token_loss(nll, z_loss=cfg.train.z_loss)
    optimizer, schedule = make_optimizer(
        cfg.optim, num_steps=cfg.train.num_steps, decay_mask=specs.decay_mask(spec), spec=spec
    )
    ema = cfg.train.ema_decay is not None
    result = train(
        cfg.train,
        run_dir=cfg.run_dir,
        init_state=lambda: init_state(
            jax.random.key(cfg.train.seed), spec, optimizer, mesh=mesh, ema=ema, params=_initial_params(cfg)
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
            make_eval_step(loss_fn), _heldout(cfg, data), place=partial(shard_batch, mesh=mesh), params_of=averaged
        )
        if data.heldout
        else None,
        record=make_record(
            to_dict(cfg), mesh=mesh, data_fingerprint=data.fingerprint, flop_definition=flops.DEFINITION
        ),
        batch_indices=data.train.indices,
        throughput=_throughput(cfg, model, spec, mesh),
        constants={f"data/{reason}": float(n) for reason, n in data.skipped.items()},
    )
    if jax.process_index() == 0:
        _report(cfg, result)
    if cfg.sample_prompts:
        _sample(cfg, model, averaged(result.state), tokenizer, constrain)
    return result


def say(text: str) -> None:
    """Prints on the first process, which speaks for all."""
    if jax.process_index() == 0:
        print(text, flush=True)


def averaged(state: Any) -> Params:
    """The parameters to evaluate and to keep: the moving average where there is one."""
    return state.params if state.ema is None else state.ema


def _model(cfg: Config) -> DecoderConfig:
    assert cfg.model is not None
    return cfg.model


def _apply(model: DecoderConfig, constrain: Any) -> Any:
    def apply(params: Params, tokens: Array, *, positions: Any, segments: Any, key: Any) -> Array:
        return decoder.forward(
            params, tokens, cfg=model, positions=positions, segments=segments, key=key, constrain=constrain
        ).hidden

    return apply


def _initial_params(cfg: Config) -> Params | None:
    return None if cfg.init_from is None else hf.load(cfg.init_from)[1]


def _check_vocabulary(model: DecoderConfig, tokenizer: Tokenizer, cfg: Config) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer {cfg.data.tokenizer!r} has {tokenizer.vocab_size} ids and the model only "
            f"vocab_size={model.vocab_size}: set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    if model.learned_positions and cfg.data.sequence_length > model.max_length:
        raise ValueError(
            f"data.sequence_length={cfg.data.sequence_length} exceeds the learned positions of the model "
            f"(max_length={model.max_length}): shorten the one or lengthen the other"
        )


def _heldout(cfg: Config, data: pipeline.Datasets) -> dict[str, Any]:
    size = cfg.data.eval_batch_size or cfg.data.batch_size
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    return {name: partial(eval_batches, rows, batch_size=size, **hosts) for name, rows in data.heldout.items()}


def _throughput(cfg: Config, model: DecoderConfig, spec: specs.Spec, mesh: jax.sharding.Mesh) -> Throughput:
    per_token = flops.flops_per_token(
        spec,
        sequence_length=cfg.data.sequence_length,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
    )
    peak = flops.peak_flops()
    tokens = cfg.data.batch_size * cfg.data.sequence_length
    return Throughput(tokens, per_token, None if peak is None else peak * mesh.size)


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


def _sample(cfg: Config, model: DecoderConfig, params: Params, tokenizer: Tokenizer, constrain: Any) -> None:
    results = generate(
        params, cfg.sample_prompts, cfg=model, sampling=cfg.sampling, tokenizer=tokenizer, constrain=constrain
    )
    for result in results:
        say(f"--- {cfg.sample_prompts[result.prompt]!r} continued\n{cfg.sample_prompts[result.prompt]}{result.text}")
