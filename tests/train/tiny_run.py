"""A run of a two-matrix language model through the real loop, step and state; also a script, for tests that kill it."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlm.models.spec import Param, normal
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import shard_batch
from jaxlm.train.checkpoint import Checkpoints
from jaxlm.train.evaluate import make_evaluate
from jaxlm.train.loop import Result, TrainConfig, compile_ahead, train
from jaxlm.train.progress import Throughput
from jaxlm.train.state import abstract_state, init_state
from jaxlm.train.step import make_eval_step, make_train_step

V, D, B, T = 32, 16, 8, 4


def tiny_spec(width: int = D) -> dict[str, Any]:
    return {
        "embed": {"table": Param((V, width), ("vocab", "embed"), normal(1.0))},
        "unembed": {"table": Param((V, width), ("vocab", "embed"), normal(1.0))},
    }


def make_optimizer() -> optax.GradientTransformation:
    return optax.adamw(optax.linear_schedule(0.0, 3e-2, 10))


def loss_fn(params, batch, key):
    """Predicts a token from the one before; a row's key adds noise, so that resuming must restore the randomness."""
    hidden = params["embed"]["table"][batch["inputs"]]
    if key is not None:
        hidden += 0.1 * jax.vmap(lambda k: jax.random.normal(k, hidden.shape[1:]))(key)
    logprobs = jax.nn.log_softmax(hidden @ params["unembed"]["table"].T)
    nll = -jnp.take_along_axis(logprobs, batch["targets"][..., None], axis=-1)[..., 0]
    total, weight = jnp.sum(nll * batch["scale"]), jnp.float32(nll.size)
    return total, weight, {"loss": (total, weight)}


def host_batch(step: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([7, step])
    tokens = rng.integers(0, V, (B, T + 1), dtype=np.int32)
    tokens[:, 1:] = (tokens[:, :1] + np.arange(1, T + 1)) % V
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "scale": np.ones((B, T), np.float32)}


class Data:
    """Batches by step; `bad` steps have a NaN in them, and `before[step]` is called when that step is asked for."""

    def __init__(self, bad: tuple[int, ...] = (), before: dict[int, Callable[[], None]] | None = None):
        self.bad, self.before, self.asked = bad, before or {}, []

    def batches(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        for step in range(start, stop):
            self.asked.append(step)
            self.before.get(step, lambda: None)()
            batch = host_batch(step)
            if step in self.bad:
                batch["scale"] = np.full((B, T), np.nan, np.float32)
            yield step, batch


@cache
def initial_state(width: int) -> Any:
    """The state of step 0 on the host; cached, since its compilation costs more than a run."""
    with jax.transfer_guard("allow"):  # the seed is a Python number; the loop itself is to run under any guard
        mesh = make_mesh(MeshConfig(), devices=jax.devices()[:1])
        return jax.device_get(init_state(jax.random.key(0), tiny_spec(width), make_optimizer(), mesh=mesh, ema=True))


_COMPILED: dict[Any, Any] = {}


def compile_once(key: Any, *step_state_batch: Any) -> Any:
    """One compilation per mesh and width for all runs of the process."""
    if key not in _COMPILED:
        _COMPILED[key] = compile_ahead(*step_state_batch)
    return _COMPILED[key]


def tiny_run(
    run_dir: Path,
    *,
    num_devices: int = 1,
    fsdp: int = 1,
    slices: int = 1,
    num_steps: int = 24,
    data: Data | None = None,
    width: int = D,
    config: dict[str, Any] | None = None,
    step_fn: Callable[..., Any] | None = None,
    compile_step: Callable[..., Any] | None = None,
    before_eval: Callable[[], None] = lambda: None,
    profile_steps: tuple[int, ...] = (),
    **overrides: Any,
) -> Result:
    data = data or Data()
    options = dict(num_steps=num_steps, log_every=5, eval_every=8, checkpoint_every=4, keep_last=2) | overrides
    cfg = TrainConfig(**options)
    mesh = make_mesh(MeshConfig(slice=slices, fsdp=fsdp), devices=jax.devices()[:num_devices])
    spec, optimizer = tiny_spec(width), make_optimizer()

    def held_out() -> Iterator[dict[str, np.ndarray]]:
        before_eval()
        yield from (host_batch(1000 + i) for i in range(3))

    target = abstract_state(spec, optimizer, mesh=mesh, ema=True)

    place = partial(shard_batch, mesh=mesh)
    return train(
        cfg,
        run_dir=run_dir,
        init_state=lambda: jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), initial_state(width), target),
        abstract_state=target,
        train_step=step_fn or make_train_step(loss_fn, optimizer, seed=cfg.seed, ema_decay=0.9, dropout=True),
        batches=data.batches,
        place=place,
        evaluate=make_evaluate(make_eval_step(loss_fn), {"eval": held_out}, place=place),
        record={"config": {"train": options, "model": {"width": width}, **(config or {})}},
        batch_indices=lambda step: list(range(step * B, (step + 1) * B)),
        compile_step=compile_step or (partial(compile_once, (*mesh.shape_tuple, width)) if step_fn is None else None),
        profile_steps=profile_steps,
        throughput=Throughput(tokens_per_step=B * T, flops_per_token=6.0 * V * D, peak_flops=1e12),
    )


def comparable(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without times and memory."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


def main() -> None:
    """Runs as a child process; --kill-in-save-of ends it with SIGKILL while that step's checkpoint is half written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kill-in-save-of", type=int, default=None)
    parser.add_argument("--width", type=int, default=D)
    arguments = parser.parse_args()
    if arguments.kill_in_save_of is not None:
        _kill_in_save(arguments.kill_in_save_of)
    tiny_run(arguments.run_dir, width=arguments.width)


def _kill_in_save(step: int) -> None:
    """Kills this process right when a save has begun to write in the background."""
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, saved: int, *arguments: Any, **options: Any) -> None:
        save(self, saved, *arguments, **options)
        if saved == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoints.save = save_and_die


if __name__ == "__main__":
    main()
