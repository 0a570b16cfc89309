"""What every recipe that trains a decoder on text wires alike."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import Loader, Rows, eval_batches
from jaxlm.data.show import render_batch
from jaxlm.data.tokenizer import Tokenizer, load_tokenizer
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder, hf
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.config import to_dict
from jaxlm.recipes.describe import parameter_table
from jaxlm.recipes.load import load_config, load_model
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import check_batch, make_constrain, shard_batch
from jaxlm.sharding.rules import param_shardings
from jaxlm.train import flops
from jaxlm.train.chips import peak_flops
from jaxlm.train.config import TrainConfig
from jaxlm.train.evaluate import Evaluate
from jaxlm.train.loop import Result, train
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.profile import ProfileConfig
from jaxlm.train.progress import Throughput
from jaxlm.train.record import FILE, make_record
from jaxlm.train.state import TrainState, abstract_state, init_state
from jaxlm.train.step import make_train_step
from jaxlm.typing import Apply, Array, Batch, Constrain, LossFn, Params


def say(text: str) -> None:
    """Prints on the first process, which speaks for all."""
    if jax.process_index() == 0:
        print(text, flush=True)


class RunConfig(Protocol):
    """The groups that every recipe has which trains a decoder on text."""

    run_dir: str
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    model: DecoderConfig | None
    init_from: str | None
    mesh: MeshConfig
    profile: ProfileConfig


C = TypeVar("C")


def resolve(cfg: C) -> C:
    """Fills in the model from `init_from`; ValueError if neither is given."""
    if cfg.model is not None:
        return cfg
    if cfg.init_from is None:
        raise ValueError("config: give model (the decoder's fields) or init_from (a Hugging Face or run folder)")
    return dataclasses.replace(cfg, model=load_config(cfg.init_from))  # type: ignore[type-var]


class Setup(NamedTuple):
    """What a run has before its loss: place puts a host batch on the mesh, constrain pins activations."""

    model: DecoderConfig
    mesh: Mesh
    tokenizer: Tokenizer
    data: pipeline.Datasets
    place: Callable[[Any], Batch]
    constrain: Constrain


def set_up(cfg: RunConfig) -> Setup:
    """Mesh, tokenizer and data of a resolved config, checked against each other, and the tokenizer kept in run_dir."""
    assert cfg.model is not None  # resolve
    mesh, tokenizer = make_mesh(cfg.mesh), load_tokenizer(cfg.data.tokenizer)
    check_batch(
        mesh,
        batch_size=cfg.data.batch_size,
        num_microbatches=cfg.train.num_microbatches,
        sequence_length=cfg.data.sequence_length,
    )
    check_vocabulary(cfg.model, tokenizer, cfg.data)
    data = pipeline.build(cfg.data, tokenizer, process_index=jax.process_index(), process_count=jax.process_count())
    data.train.require(cfg.train.num_steps)
    tokenizer.save(Path(cfg.run_dir) / "tokenizer")
    return Setup(cfg.model, mesh, tokenizer, data, partial(shard_batch, mesh=mesh), make_constrain(mesh))


def show_start(spec: specs.Spec, s: Setup) -> None:
    """Says what is trained on what: the table of parameters, the first batch as text, and the rows left out."""
    say(parameter_table(spec, param_shardings(spec, s.mesh)))
    say(render_batch(s.data.train.batch(0), s.tokenizer, rows=1))
    if s.data.skipped:
        say("left out of the data: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(s.data.skipped.items())))


class TrainConfigs(Protocol):
    """The groups of a config that the trainer reads, whatever is trained on what."""

    run_dir: str
    data: Any
    train: TrainConfig
    optim: OptimConfig
    profile: ProfileConfig


class TrainData(Protocol):
    """Batches, what was left out by reason, and a hash of the data."""

    @property
    def train(self) -> Loader: ...
    @property
    def skipped(self) -> Counter[str]: ...
    @property
    def fingerprint(self) -> str: ...


class Step(NamedTuple):
    """What the loop runs, and the state that it runs on: its shapes and where they lie."""

    run: Callable[[Any, Batch], Any]
    abstract: TrainState
    optimizer: Any
    ema: bool


def make_step(
    cfg: TrainConfigs, spec: specs.Spec, loss_fn: LossFn, *, mesh: Mesh, row_keys: bool,
    move_frozen: Callable[[Array, Params, Params], Params] | None = None,
) -> Step:  # fmt: skip
    """The optimizer of a config, and the step that it makes of a loss; arguments as in `train_parameters`."""
    optimizer, schedule = make_optimizer(
        cfg.optim, num_steps=cfg.train.num_steps, decay_mask=specs.decay_mask(spec), spec=spec
    )
    run = make_train_step(
        loss_fn, optimizer, seed=cfg.train.seed, schedule=schedule, num_microbatches=cfg.train.num_microbatches,
        ema_decay=cfg.train.ema_decay, dropout=row_keys, move_frozen=move_frozen,
    )  # fmt: skip
    ema = cfg.train.ema_decay is not None
    return Step(run, abstract_state(spec, optimizer, mesh=mesh, ema=ema), optimizer, ema)


def train_parameters(
    cfg: TrainConfigs,
    spec: specs.Spec,
    loss_fn: LossFn,
    *,
    mesh: Mesh,
    data: TrainData,
    place: Callable[[Any], Batch],
    initial: Callable[[], Params | None],
    evaluate: Evaluate | None,
    speed: Throughput,
    row_keys: bool,
    frozen: Params | None = None,
    moving: Callable[[], Params] | None = None,
    move_frozen: Callable[[Array, Params, Params], Params] | None = None,
) -> Result:
    """Trains the parameters of `spec` on the data: the optimizer, the state, the step, and the loop.

    place: puts a host batch on the mesh. initial: makes the parameters of step 0 (None: random ones of the seed).
    speed: what tokens/s and MFU are counted by. row_keys: whether the loss gets a random key for every row (dropout,
    masked words). frozen: what the loss reads beside them and no checkpoint holds. moving: makes such parameters for
    the state of step 0, where `move_frozen` lets them follow (see `make_train_step`); those are in the checkpoints.
    """
    step = make_step(cfg, spec, loss_fn, mesh=mesh, row_keys=row_keys, move_frozen=move_frozen)

    def first_state() -> TrainState:
        key = jax.random.key(cfg.train.seed)
        state = init_state(key, spec, step.optimizer, mesh=mesh, ema=step.ema, params=initial())
        return state if moving is None else state.replace(frozen=moving())  # type: ignore[attr-defined]

    abstract = step.abstract
    if moving is not None:
        abstract = abstract.replace(frozen=abstract.params)  # type: ignore[attr-defined]
    return train(
        cfg.train,
        run_dir=cfg.run_dir,
        init_state=first_state,
        abstract_state=abstract,
        train_step=step.run,
        batches=partial(data.train.batches, num_threads=cfg.data.num_threads),
        place=place,
        evaluate=evaluate,
        record=make_record(
            to_dict(cfg), mesh=mesh, data_fingerprint=data.fingerprint, flop_definition=flops.DEFINITION
        ),
        batch_indices=data.train.indices,
        throughput=speed,
        constants={f"data/{reason}": float(n) for reason, n in data.skipped.items()},
        frozen=frozen,
        profile_steps=cfg.profile.steps,
    )


def averaged(state: Any) -> Params:
    """The parameters to evaluate and to keep: the moving average where there is one."""
    return state.params if state.ema is None else state.ema


def make_apply(model: DecoderConfig, constrain: Constrain) -> Apply:
    """The decoder as the trainer sees it: parameters and packed tokens in, hidden states out."""

    def apply(params: Params, tokens: Array, *, positions: Any, segments: Any, key: Any) -> Array:
        return decoder.forward(
            params, tokens, cfg=model, positions=positions, segments=segments, in_order=True, key=key,
            constrain=constrain,
        ).hidden  # fmt: skip

    return apply


def initial_params(init_from: str | None) -> Params | None:
    """The parameters in a Hugging Face folder (not its tokenizer) or a run's newest checkpoint; None for none."""
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
    return {name: partial(every_batch, rows, cfg) for name, rows in data.heldout.items()}


def every_batch(rows: Rows, cfg: DataConfig) -> Iterator[Any]:
    """This host's slices of the batches that hold all rows once."""
    size = cfg.eval_batch_size or cfg.batch_size
    return eval_batches(rows, batch_size=size, process_index=jax.process_index(), process_count=jax.process_count())


def throughput(cfg: DataConfig, model: DecoderConfig, spec: specs.Spec, mesh: jax.sharding.Mesh) -> Throughput:
    """What tokens/s and MFU are counted by."""
    per_token = flops.flops_per_token(
        spec,
        sequence_length=cfg.sequence_length,
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        head_dim=model.head_dim,
    )
    peak = peak_flops()
    return Throughput(cfg.batch_size * cfg.sequence_length, per_token, None if peak is None else peak * mesh.size)


def say_continuations(prompts: Sequence[str], sampling: SamplingConfig, params: Params, s: Setup) -> None:
    """Says every prompt with what the model writes after it."""
    results = generate(params, prompts, cfg=s.model, sampling=sampling, tokenizer=s.tokenizer, constrain=s.constrain)
    for r in results:
        say(f"--- {prompts[r.prompt]!r} continued\n{prompts[r.prompt]}{r.text}")
