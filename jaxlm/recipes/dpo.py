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

from jaxlm.data.config import DataConfig
from jaxlm.generate.sample import SamplingConfig
from jaxlm.losses import mix_reference
from jaxlm.models import decoder, lora
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
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
    heldout_batches,
    initial_params,
    make_apply,
    resolve,
    say,
    say_continuations,
    set_up,
    show_start,
    throughput,
    train_parameters,
)
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.sharding.place import make_constrain
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.config import TrainConfig
from jaxlm.train.evaluate import make_evaluate
from jaxlm.train.loop import Result
from jaxlm.train.objectives import make_hidden_scorer
from jaxlm.train.optim import OptimConfig
from jaxlm.train.plot import plot_run
from jaxlm.train.preference import (
    Objective,
    ParamsOf,
    Scorer,
    frozen_alone,
    make_pair_objective,
    make_preference_eval,
    make_preference_loss,
    make_response_objective,
    make_scorer,
    policy_alone,
)
from jaxlm.train.profile import ProfileConfig
from jaxlm.train.reference import make_score_step
from jaxlm.typing import Array, LossFn, Params


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
    profile: ProfileConfig = ProfileConfig()
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


def run(cfg: Config) -> Result:
    """Trains, evaluates, and reports; started again on the same run folder, it resumes."""
    cfg = resolve(cfg)
    s = set_up(cfg)
    spec = decoder.spec(s.model)
    trained = spec if cfg.lora is None else lora.lora_spec(spec, cfg.lora)
    show_start(trained, s)
    # Compacted along a sharded length, targets would travel between devices.
    capacity = s.data.capacity if s.mesh.shape["sequence"] == 1 else None
    scorer = make_response_scorer(cfg, s.model, s.mesh, slots=s.data.slots, capacity=capacity)
    score = make_score_step(scorer, s.mesh)
    starting = partial(start, cfg, spec, s.mesh)
    if cfg.needs_reference and cfg.reference == "cached":
        options = {"model": dataclasses.asdict(s.model), "ld_alpha": cfg.ld_alpha, "capacity": capacity}
        folder = Path(cfg.cache_dir or Path(cfg.run_dir) / "reference")
        s = s._replace(data=with_reference(s, score, starting(), cfg.data, options=options, folder=folder))
    policy, reference = models(cfg)
    objective = make_objective(cfg)
    heldout, moving = heldout_batches(cfg.data, s.data), cfg.sync_every is not None
    eval_step = make_preference_eval(score, objective, policy=policy, reference=reference)
    result = train_parameters(
        cfg,
        trained,
        make_loss(cfg, scorer),
        mesh=s.mesh,
        data=s.data,
        place=s.place,
        speed=throughput(cfg.data, s.model, spec, s.mesh),
        row_keys=s.model.dropout > 0,
        initial=lambda: initial_params(cfg.init_from) if cfg.lora is None else None,
        evaluate=make_evaluate(
            eval_step, heldout, place=s.place, params_of=lambda state: (averaged(state), state.frozen), jit=False
        )
        if heldout
        else None,
        frozen=starting() if not moving and (cfg.lora is not None or reference is not None) else None,
        moving=starting if moving else None,
        move_frozen=_moving(cfg),
    )
    if jax.process_index() == 0:
        folder = Path(cfg.run_dir)
        say(f"loss curve: {plot_run(folder / 'metrics.jsonl', folder / 'loss.png', metric='loss')}")
    say_continuations(cfg.sample_prompts, cfg.sampling, final_params(cfg, result), s)
    return result


def make_response_scorer(
    cfg: Config, model: DecoderConfig, mesh: jax.sharding.Mesh, *, slots: int, capacity: int | None
) -> Scorer:
    """The summed log-probabilities of the responses in a row. capacity: see `make_hidden_scorer`."""
    apply = make_apply(model, make_constrain(mesh))
    score = make_hidden_scorer(apply, partial(decoder.head, cfg=model), mesh=mesh, capacity=capacity)
    return make_scorer(score, slots=slots, ld_alpha=cfg.ld_alpha)


def make_loss(cfg: Config, scorer: Scorer) -> LossFn:
    """The losses of the config on responses that are scored so."""
    policy, reference = models(cfg)
    return make_preference_loss(scorer, make_objective(cfg), policy=policy, reference=reference)


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
