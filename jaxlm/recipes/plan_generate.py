"""What `jaxlm plan --generate` compiles: the two programs of generation, for the decoder of a config on its mesh."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.generate import engine
from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.ops.platform import compiling_for
from jaxlm.recipes.plan import compile_lowered, held, read_plan
from jaxlm.recipes.plan_table import Plan
from jaxlm.recipes.plan_work import abstract_params
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.place import make_constrain
from jaxlm.sharding.rules import partition_spec
from jaxlm.train.flops import matmul_parameters


class Load(NamedTuple):
    """What is generated at once. rows: slots decoded together; prompt: tokens of the longest one; new: at most."""

    rows: int
    prompt: int
    new: int

    @property
    def length(self) -> int:
        """Positions of a row in the cache."""
        return max(engine.bucket(self.prompt + self.new), engine.bucket(self.prompt))


def make_plans(cfg: Any, found: Sequence[Any], load: Load) -> dict[str, Plan]:
    """The plans of prefill (all rows at once, the worst case) and of decoding one token in every row, on those devices,
    which need not be here. ValueError for a config without a decoder, or a load that its positions do not hold."""
    model = getattr(cfg, "model", None)
    if not isinstance(model, DecoderConfig):
        raise ValueError(f"--generate needs the config of a decoder, found recipe {cfg.recipe!r} without one")
    if min(load) < 1 or load.prompt + load.new > model.max_length:
        raise ValueError(
            f"--generate {load.rows} {load.prompt} {load.new}: expected positive numbers, prompt and new tokens of at "
            f"most {model.max_length} positions together (model.max_length)"
        )
    model = dataclasses.replace(model, dropout=0.0)
    with compiling_for(found[0].platform, found):
        mesh = make_mesh(cfg.mesh, found)
        programs = _Programs(model, mesh, load)
        return {"prefill": programs.prefill(), "decode": programs.decode()}


class _Programs:
    """The shapes and shardings that both programs share."""

    def __init__(self, model: DecoderConfig, mesh: Mesh, load: Load) -> None:
        self.model, self.mesh, self.load = model, mesh, load
        self.spec, self.constrain = decoder.spec(model), make_constrain(mesh)
        self.params = abstract_params(self.spec, mesh)
        shapes = jax.eval_shape(lambda: engine.init_slots(model, load.rows, load.length))
        everywhere = NamedSharding(mesh, PartitionSpec())
        cache = NamedSharding(mesh, partition_spec(engine.CACHE_AXES))
        self.slots = jax.tree.map(lambda x: _placed(x, cache if x.ndim == 5 else everywhere), shapes)

    def prefill(self) -> Plan:
        """All rows get prompts of their own."""
        rows, width = self.load.rows, engine.bucket(self.load.prompt)
        number, key = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0)).dtype
        prompts = jax.ShapeDtypeStruct((rows, width), jnp.int32)
        keys = jax.ShapeDtypeStruct((rows,), key)
        arguments = (self.params, self.slots, prompts, number, number, number, keys, number)
        flops = rows * width * self._forward(width // 2, head=False)
        return self._plan(engine.refill, arguments, flops, rows * width)

    def decode(self) -> Plan:
        """One token in every row; the cache is full."""
        options = dict(num_steps=1, temperature=1.0, k=None, p=None, minimum=None, eos_ids=(0,))
        flops = self.load.rows * self._forward(self.load.length, head=True)
        return self._plan(engine.decode, (self.params, self.slots), flops, self.load.rows, **options)

    def _forward(self, attended: int, *, head: bool) -> float:
        """FLOPs of a token that attends to so many."""
        model = self.model
        products = matmul_parameters(self.spec) - (0 if head else model.vocab_size * model.width)
        return 2.0 * products + 4.0 * model.num_layers * model.num_heads * model.head_dim * attended

    def _plan(self, program: Any, arguments: tuple[Any, ...], flops: float, tokens: int, **options: Any) -> Plan:
        start, cache = time.perf_counter(), self.slots.cache
        lowered = program.lower(*arguments, cfg=self.model, constrain=self.constrain, **options)
        compiled = compile_lowered(lowered, "fewer rows, shorter ones, or more devices")
        memory = {"parameters": held(self.params), "cache": held((cache.keys, cache.values))}
        found = read_plan(compiled, memory, self.mesh, model_flops=flops, tokens=tokens, in_place=True)
        return found._replace(compile_s=time.perf_counter() - start)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
