"""Optimizers and schedules, composed from optax."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import optax
from optax.contrib import MuonDimensionNumbers, muon

from jaxlm.models.spec import Param, Spec, map_spec


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """learning_rate is the peak. schedule: from 0 over warmup_steps to the peak, then cosine or linear down to
    final_share of it, constant, or wsd (constant, then linear down over the last decay_share of the steps).
    weight_decay is decoupled and spares norms and biases. clip_norm: global norm of the gradient. momentum is Muon's;
    Muon updates the matrices of the blocks, and AdamW (at learning_rate * adam_share) everything else.
    """

    name: Literal["adamw", "lion", "muon", "adafactor"] = "adamw"
    learning_rate: float = 3e-4
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    final_share: float = 0.1
    decay_share: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    adam_share: float = 1.0
    clip_norm: float | None = 1.0


def make_schedule(cfg: OptimConfig, *, num_steps: int) -> optax.Schedule:
    """Step (from 0) to learning rate; step s is the rate of the (s+1)-th update.

    The warm-up is linear and reaches the peak at step warmup_steps. Raises ValueError if it does not end in time.
    """
    if not 0 <= cfg.warmup_steps <= num_steps:
        raise ValueError(f"optim.warmup_steps={cfg.warmup_steps} must lie within the {num_steps} steps of the run")
    rest, peak, end = num_steps - cfg.warmup_steps, cfg.learning_rate, cfg.learning_rate * cfg.final_share
    parts, bounds = [], []
    if cfg.warmup_steps:
        # From one share of the peak, not from 0: the first update is never empty.
        parts.append(optax.linear_schedule(peak / (cfg.warmup_steps + 1), peak, cfg.warmup_steps))
        bounds.append(cfg.warmup_steps)
    if cfg.schedule == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, max(rest, 1), alpha=cfg.final_share))
    elif cfg.schedule == "linear":
        parts.append(optax.linear_schedule(peak, end, max(rest, 1)))
    elif cfg.schedule == "wsd":
        decay = max(1, round(cfg.decay_share * num_steps))
        parts += [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)]
        bounds.append(max(cfg.warmup_steps, num_steps - decay))
    else:
        parts.append(optax.constant_schedule(peak))
    return optax.join_schedules(parts, bounds)


def make_optimizer(
    cfg: OptimConfig, *, num_steps: int, decay_mask: Any, spec: Spec | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The gradient transformation and its schedule.

    decay_mask: a tree of bools, True where weight decay applies (`models.spec.decay_mask`). spec: needed by Muon alone,
    which must know which axes of a kernel are its inputs.
    """
    schedule = make_schedule(cfg, num_steps=num_steps)
    clip = optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm)
    return optax.chain(clip, _rule(cfg, schedule, decay_mask, spec)), schedule


def _rule(cfg: OptimConfig, schedule: optax.Schedule, mask: Any, spec: Spec | None) -> optax.GradientTransformation:
    if cfg.name == "adamw":
        return optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay, mask=mask)
    if cfg.name == "lion":
        return optax.lion(schedule, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=mask)
    if cfg.name == "adafactor":
        # Its decay is not multiplied by the learning rate inside, so it is scaled here to mean what AdamW's means.
        rate = cfg.weight_decay * cfg.learning_rate or None
        return optax.adafactor(schedule, weight_decay_rate=rate, weight_decay_mask=mask)
    if spec is None:
        raise ValueError("optim.name='muon' needs the model's spec, to know the input axes of each kernel")
    return muon(
        schedule,
        beta=cfg.momentum,
        weight_decay=cfg.weight_decay,
        weight_decay_mask=mask,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        adam_weight_decay=cfg.weight_decay,
        adam_learning_rate=lambda step: schedule(step) * cfg.adam_share,
        muon_weight_dimension_numbers=muon_dimensions(spec),
        # Updates of the size of AdamW's, so that one learning rate serves both (Liu et al., 2025, arXiv 2502.16982).
        consistent_rms=0.2,
    )


def muon_dimensions(spec: Spec) -> Any:
    """Which axes of each kernel Muon takes as input and output; None for what AdamW updates.

    Kernels of the blocks read from the width (`embed` is their input) or write to it (`embed` is their output), with
    all other axes but `layers` on the other side: each layer is one matrix. Embeddings, norms and biases are AdamW's.
    """

    def dimensions(p: Param) -> MuonDimensionNumbers | None:
        if "layers" not in p.axes or "embed" not in p.axes or len(p.axes) < 3:
            return None
        width = p.axes.index("embed")
        others = tuple(i for i, axis in enumerate(p.axes) if axis not in ("layers", "embed"))
        if width == 1:
            return MuonDimensionNumbers(reduction_axis=(width,), output_axis=others)
        return MuonDimensionNumbers(reduction_axis=others, output_axis=(width,))

    return map_spec(dimensions, spec)
