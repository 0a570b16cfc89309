"""Preference optimisation on text: DPO and its relatives, from pairs or from labelled responses.

    jaxlm train --config configs/dpo/hh_small.py:pairs.jsonl.gz

`run` is the whole of it, top to bottom: data, model, reference, objective, loop, report. The reference is the model
that the run starts from. Its log-probabilities are computed once and kept (reference="cached"), or at every step
("live"); under adapters it is the base. Losses: `jaxlm.losses`, by name, see `recipes/preference_losses.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.show import render_batch
from jaxlm.data.tokenizer import load_tokenizer
from jaxlm.generate.sample import SamplingConfig
from jaxlm.losses import mix_reference
from jaxlm.models import decoder, lora
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.config import to_dict
from jaxlm.recipes.describe import parameter_table
from jaxlm.recipes.dpo_reference import with_reference
from jaxlm.recipes.preference_losses import (
    RESPONSES,
    LossTerm,
    beta_of,
    check_terms,
    make_pair_values,
    make_response_values,
    make_rewards,
)
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
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.optim import OptimConfig, make_optimizer
from jaxlm.train.plot import plot_run
from jaxlm.train.preference import (
    Objective,
    ParamsOf,
    frozen_alone,
    make_pair_objective,
    make_preference_eval,
    make_preference_loss,
    make_response_objective,
    make_scorer,
    policy_alone,
)
from jaxlm.train.record import make_record
from jaxlm.train.reference import make_score_step
from jaxlm.train.state import TrainState, abstract_state, init_state
from jaxlm.train.step import make_train_step
from jaxlm.typing import Array, Params


@dataclasses.dataclass(frozen=True)
class Config:
    """A preference run. What the groups hold is documented where they are defined.

    model, init_from: as in the recipe `lm`; a random model is a test, not a policy. losses: terms of one sum.
    reference: cached (computed once; kept in cache_dir, or run_dir/reference, under a key of parameters, data and
    options) or live. sync_every: TR-DPO, the live reference moves towards the policy by sync_weight every so many
    updates. ld_alpha: what tokens beyond the other response's length count, in policy and reference (None: 1). lora:
    train adapters; checkpoints hold them alone.
    """

    run_dir: str
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig(learning_rate=1e-6, weight_decay=0.0)
    model: DecoderConfig | None = None
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    recipe: Literal["dpo"] = "dpo"
    losses: tuple[LossTerm, ...] = (LossTerm(),)
    reference: Literal["cached", "live"] = "cached"
    cache_dir: str | None = None
    sync_every: int | None = None
    sync_weight: float = 0.6
    ld_alpha: float | None = None
    lora: lora.LoraConfig | None = None
    sample_prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()

    def __post_init__(self) -> None:
        check_terms(self.losses, examples=self.data.examples, num_microbatches=self.train.num_microbatches)
        if self.sync_every is not None and (self.reference != "live" or self.lora is not None):
            raise ValueError("sync_every moves the reference: it needs reference='live' and no lora")
        if self.sync_every is not None and not self.needs_reference:
            raise ValueError(f"sync_every moves the reference, and {self.losses[0].name} has none: leave it out")
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1] (1 is the plain sum), found {self.ld_alpha}")
        if self.train.z_loss:
            raise ValueError(f"train.z_loss is of the recipe lm, found {self.train.z_loss}: leave it 0")
        if self.ld_alpha is not None and self.data.examples != "pairs":
            raise ValueError(
                f"ld_alpha compares the two responses of a pair, found data.examples={self.data.examples!r}"
            )

    @property
    def needs_reference(self) -> bool:
        """Whether any loss compares with the reference."""
        return any(term.needs_reference for term in self.losses)


def resolve(cfg: Config) -> Config:
    """Fills in the model from `init_from`; ValueError if neither is given."""
    if cfg.model is not None:
        return cfg
    if cfg.init_from is None:
        raise ValueError("config: give init_from (a Hugging Face or run folder) or model (the decoder's fields)")
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
    trained_spec = spec if cfg.lora is None else lora.lora_spec(spec, cfg.lora)
    say(parameter_table(trained_spec, param_shardings(trained_spec, mesh)))
    say(render_batch(data.train.batch(0), tokenizer, rows=1))
    say_left_out(data)
    tokenizer.save(Path(cfg.run_dir) / "tokenizer")

    constrain, place = make_constrain(mesh), partial(shard_batch, mesh=mesh)
    scorer = make_scorer(
        make_hidden_scorer(
            make_apply(model, constrain),
            partial(decoder.head, cfg=model),
            mesh=mesh,
            # Compacted along a sharded length, targets would travel between devices.
            capacity=data.capacity if mesh.shape["sequence"] == 1 else None,
        ),
        slots=data.slots,
        ld_alpha=cfg.ld_alpha,
    )
    score = make_score_step(scorer, mesh)
    if cfg.needs_reference and cfg.reference == "cached":
        data = with_reference(
            data,
            score,
            start(cfg, spec, mesh),
            cfg.data,
            options={
                "model": dataclasses.asdict(model),
                "ld_alpha": cfg.ld_alpha,
                "mesh": dict(mesh.shape),
                "capacity": data.capacity,
            },
            folder=Path(cfg.cache_dir or Path(cfg.run_dir) / "reference"),
            place=place,
        )
    policy, reference = models(cfg)
    objective = make_objective(cfg)
    optimizer, schedule = make_optimizer(
        cfg.optim, num_steps=cfg.train.num_steps, decay_mask=specs.decay_mask(trained_spec), spec=trained_spec
    )
    ema, moving = cfg.train.ema_decay is not None, cfg.sync_every is not None

    def first_state() -> TrainState:
        params = initial_params(cfg.init_from) if cfg.lora is None else None
        state = init_state(jax.random.key(cfg.train.seed), trained_spec, optimizer, mesh=mesh, ema=ema, params=params)
        return state.replace(frozen=start(cfg, spec, mesh)) if moving else state  # type: ignore[attr-defined]

    fixed = not moving and (cfg.lora is not None or reference is not None)

    abstract = abstract_state(trained_spec, optimizer, mesh=mesh, ema=ema)
    result = train(
        cfg.train,
        run_dir=cfg.run_dir,
        init_state=first_state,
        abstract_state=abstract.replace(frozen=abstract.params) if moving else abstract,  # type: ignore[attr-defined]
        train_step=make_train_step(
            make_preference_loss(scorer, objective, policy=policy, reference=reference),
            optimizer,
            seed=cfg.train.seed,
            schedule=schedule,
            num_microbatches=cfg.train.num_microbatches,
            ema_decay=cfg.train.ema_decay,
            dropout=model.dropout > 0,
            move_frozen=_moving(cfg),
        ),
        batches=partial(data.train.batches, num_threads=cfg.data.num_threads),
        place=place,
        evaluate=make_evaluate(
            make_preference_eval(score, objective, policy=policy, reference=reference),
            heldout_batches(cfg.data, data),
            place=place,
            params_of=lambda state: (averaged(state), state.frozen),
            jit=False,
        )
        if data.heldout
        else None,
        record=make_record(
            to_dict(cfg), mesh=mesh, data_fingerprint=data.fingerprint, flop_definition=flops.DEFINITION
        ),
        batch_indices=data.train.indices,
        throughput=throughput(cfg.data, model, spec, mesh),
        constants={f"data/{reason}": float(n) for reason, n in data.skipped.items()},
        frozen=start(cfg, spec, mesh) if fixed else None,
    )
    if jax.process_index() == 0:
        folder = Path(cfg.run_dir)
        say(f"loss curve: {plot_run(folder / 'metrics.jsonl', folder / 'loss.png', metric='loss')}")
    for text in continuations(
        cfg.sample_prompts, final_params(cfg, result), model, cfg.sampling, tokenizer=tokenizer, constrain=constrain
    ):
        say(text)
    return result


def _model(cfg: Config) -> DecoderConfig:
    assert cfg.model is not None
    return cfg.model


def start(cfg: Config, spec: specs.Spec, mesh: jax.sharding.Mesh) -> Params:
    """The parameters that the run starts from, on the mesh: given ones, or those of the seed; a new copy each time."""
    params = initial_params(cfg.init_from)
    if params is not None:
        specs.check(params, spec)
    make = jax.jit(
        lambda key, params: specs.init(key, spec) if params is None else params,
        out_shardings=param_shardings(spec, mesh),
    )
    return make(jax.random.key(cfg.train.seed), params)


def models(cfg: Config) -> tuple[ParamsOf, ParamsOf | None]:
    """Which parameters are the policy's, and the live reference's (None: it is cached, or there is none)."""
    live = cfg.needs_reference and cfg.reference == "live"
    if cfg.lora is None:
        return policy_alone, frozen_alone if live else None
    adapted = cfg.lora

    def with_adapters(adapters: Params, base: Params) -> Params:
        return lora.join(base, adapters, adapted)

    return with_adapters, frozen_alone if live else None


def make_objective(cfg: Config) -> Objective:
    """The objective that the losses of the config make."""
    first, beta = cfg.losses[0], beta_of(cfg.losses)
    if first.name in RESPONSES:
        mismatched = cfg.data.examples == "responses_mismatched"
        return make_response_objective(make_response_values(first), beta=beta, mismatched=mismatched)
    return make_pair_objective(make_pair_values(cfg.losses), rewards=make_rewards(cfg.losses), beta=beta)


def _moving(cfg: Config) -> Callable[[Array, Params, Params], Params] | None:
    every, weight = cfg.sync_every, cfg.sync_weight
    if every is None:
        return None

    def move(step: Array, params: Params, reference: Params) -> Params:
        mixed = mix_reference(params, reference, policy_weight=weight)
        return jax.tree.map(lambda new, old: jnp.where(step % every == 0, new, old), mixed, reference)

    return move


def final_params(cfg: Config, result: Result) -> Params:
    """The trained model's parameters, adapters merged."""
    params = averaged(result.state)
    return params if cfg.lora is None else lora.merge(result.state.frozen, params, cfg.lora)
