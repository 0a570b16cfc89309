"""One training step: accumulate sums over micro-batches, divide once, update unless a number is not finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlm.train.state import TrainState
from jaxlm.typing import Array, Batch, LossFn, Metrics, Params

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Params, Batch], Metrics]


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    schedule: optax.Schedule | None = None,
    num_microbatches: int = 1,
    ema_decay: float | None = None,
    dropout: bool = False,
    move_frozen: Callable[[Array, Params, Params], Params] | None = None,
) -> Step:
    """(state, batch) -> (state, metrics), a pure function to be jitted with its state donated.

    gradient = sum over micro-batches of d total / sum of weights: the same numbers for any num_microbatches. Row r of
    the batch draws its dropout from split(fold_in(key(seed), step))[r]. If the loss or the gradient's norm is not
    finite, or nothing has weight, parameters, optimizer and average stay as they were and the step is counted as
    skipped. A loss that reads frozen parameters takes them as its keyword `frozen`; move_frozen, (updates done, params,
    frozen) -> frozen, lets them follow the trained ones. Metrics are those of the loss, and grad_norm (before
    clipping), update_norm, param_norm, learning_rate, skipped.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = next(iter(batch.values())).shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step), rows) if dropout else None
        loss = loss_fn if state.frozen is None else partial(loss_fn, frozen=state.frozen)  # type: ignore[call-arg]
        grads, total, weight, metrics = accumulate(loss, state.params, batch, keys, num_microbatches)
        inverse = jnp.where(weight > 0, 1 / jnp.where(weight > 0, weight, 1), 0)
        grads = jax.tree.map(lambda g: g * inverse, grads)
        grad_norm = optax.tree.norm(grads)
        good = jnp.isfinite(total) & jnp.isfinite(grad_norm) & (weight > 0)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None and ema_decay is not None:
            ema = jax.tree.map(lambda a, p: ema_decay * a + (1 - ema_decay) * p, ema, params)
        new = (params, opt_state, ema)
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        one = jnp.ones(())
        metrics = per_step(metrics)
        # A bad step's numbers would poison every mean they are added to: they are left out, and the step is counted.
        metrics = {name: (jnp.where(good, t, 0), jnp.where(good, w, 0)) for name, (t, w) in metrics.items()}
        metrics["grad_norm"] = (jnp.where(good, grad_norm, 0), good.astype(jnp.float32))
        metrics["update_norm"] = (jnp.where(good, optax.tree.norm(updates), 0), good.astype(jnp.float32))
        metrics["param_norm"] = (optax.tree.norm(params), one)
        metrics["skipped"] = (1 - good.astype(jnp.float32), one)
        if schedule is not None:
            metrics["learning_rate"] = (jnp.asarray(schedule(state.step), jnp.float32), one)
        skipped = 1 - good.astype(jnp.int32)
        frozen = state.frozen if move_frozen is None else move_frozen(state.step + 1, params, state.frozen)
        state = TrainState(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            num_skipped=state.num_skipped + skipped,
            num_skipped_in_a_row=(state.num_skipped_in_a_row + skipped) * skipped,
            frozen=frozen,
        )
        return state, metrics

    return step


def accumulate(
    loss_fn: LossFn, params: Params, batch: Batch, keys: Array | None, num_microbatches: int
) -> tuple[Params, Array, Array, Metrics]:
    """Sums over the micro-batches: gradient of the total, total, weight, metrics. Nothing is divided here."""

    def one(batch: Batch, keys: Array | None) -> tuple[Params, Array, Array, Metrics]:
        def objective(params: Params) -> tuple[Array, tuple[Array, Metrics]]:
            total, weight, metrics = loss_fn(params, batch, keys)
            return total, (weight, metrics)

        (total, (weight, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, total, weight, metrics

    if num_microbatches == 1:
        return one(batch, keys)
    parts = jax.tree.map(lambda x: split_rows(x, num_microbatches), (dict(batch), keys))
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
    )

    def add(sums: Any, part: tuple[Batch, Array | None]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, one(*part)), None

    return jax.lax.scan(add, zeros, parts)[0]


def per_step(metrics: Metrics) -> Metrics:
    """Counts get the weight of one step, now that all its micro-batches are summed."""
    return {name: (total, jnp.ones(()) if weight is None else weight) for name, (total, weight) in metrics.items()}


def split_rows(x: Array, parts: int) -> Array:
    """[B, …] as [parts, B/parts, …]: part i holds rows i, i + parts, …, so that every device keeps its own rows."""
    if x.shape[0] % parts:
        raise ValueError(f"{x.shape[0]} rows cannot be split into {parts} micro-batches: change one of the two")
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)


def make_eval_step(loss_fn: LossFn) -> EvalStep:
    """(params, batch) -> metrics, without dropout."""

    def step(params: Params, batch: Batch) -> Metrics:
        return per_step(loss_fn(params, batch, None)[2])

    return step
