"""Stages of `sentence_by_sentence` that train adapters of their language model instead of all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax

from jaxlm.models import lora
from jaxlm.models import spec as specs
from jaxlm.models.lora import LoraConfig
from jaxlm.typing import Array, Batch, Params

if TYPE_CHECKING:
    from jaxlm.recipes.sentence_stages import Kept, Way


def adapted(way: Way, cfg: LoraConfig, *, seed: int) -> Way:
    """The stage with adapters of the model that it starts from, and what is new in it (mappers) trained whole.

    way.spec: a decoder's, or one whose "model" is. What it trains is {"adapters": …} and the rest of the spec; the
    model itself is frozen, as "base", beside what the loss reads already ("rest").
    """
    inner = "model" in way.spec
    adapters = lora.lora_spec(way.spec["model"] if inner else way.spec, cfg)
    rest = {name: part for name, part in way.spec.items() if name != "model"} if inner else {}
    spec = {"adapters": adapters} | rest

    def whole(params: Params, base: Params, put: Any) -> Params:
        model = put(base, params["adapters"], cfg)
        return {name: params[name] for name in rest} | {"model": model} if inner else model

    def loss(params: Params, batch: Batch, key: Array | None, frozen: Params = None) -> Any:
        more = {"frozen": frozen["rest"]} if "rest" in frozen else {}
        return way.loss(whole(params, frozen["base"], lora.join), batch, key, **more)

    def base(kept: Kept) -> Params:
        start = way.initial(kept)
        assert start is not None  # it starts from another stage
        return start["model"] if inner else start

    def initial(kept: Kept) -> Params:
        started = way.initial(kept) if inner else {}
        fresh = specs.init(jax.random.key(seed), adapters)
        return {"adapters": fresh} | {name: started[name] for name in rest}

    def frozen(kept: Kept) -> Params:
        read = way.frozen(kept)
        return {"base": base(kept)} | ({} if read is None else {"rest": read})

    def merged(params: Params, kept: Kept) -> Params:
        return whole(params, base(kept), lora.merge)

    return way._replace(spec=spec, loss=loss, initial=initial, frozen=frozen, whole=merged)
