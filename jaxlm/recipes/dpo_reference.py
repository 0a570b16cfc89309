"""The reference's log-probabilities beside the data: one pass over every set, kept for the next run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import Rows
from jaxlm.ops.platform import kernels_wanted
from jaxlm.recipes.wiring import Setup, every_batch, say
from jaxlm.train.preference import Responses
from jaxlm.train.reference import cached, fingerprint, map_rows
from jaxlm.typing import Batch, Params


def with_reference(
    s: Setup,
    score: Callable[[Params, Batch], Responses],
    params: Params,
    cfg: DataConfig,
    *,
    options: Mapping[str, Any],
    folder: Path,
) -> pipeline.Datasets:
    """The set-up's data with the field `reference`: each response's summed log-probability under `params`.

    Computed in one pass per data set, or found in the folder under a key of the parameters, the data set and the
    options (JSON values), all that changes the numbers. score: jitted, see `make_score_step`.
    """
    size, slots = cfg.eval_batch_size or cfg.batch_size, s.data.slots
    shape = {"sequence_length": cfg.sequence_length, "batch_size": size, "packing": cfg.packing, "group": cfg.group}
    # Another compiler, device, mesh or kernel rounds differently, and the first evaluation would not be exact.
    machine = {"jax": jax.__version__, "device": jax.devices()[0].device_kind, "mesh": dict(s.mesh.shape)}
    machine |= {} if kernels_wanted() else {"kernels": False}
    key = {**options, **shape, **machine, "slots": slots, "parameters": fingerprint(params)}

    def referred(rows: Rows) -> Rows:
        def compute() -> np.ndarray:
            by_row = map_rows(
                lambda batch: score(params, batch).logprob, every_batch(rows, cfg), place=s.place,
                total=-(-len(rows.plan) // size), what=f"reference log-probabilities of {rows.name}",
            )  # fmt: skip
            return rows.by_document(by_row)

        entry = key | {"data": rows.corpus.fingerprint()}
        values, before = cached(folder, entry, compute, size=len(rows.corpus))
        say(f"reference log-probabilities of {rows.name}: {'found' if before else 'computed'}, {folder}")
        return rows._replace(slots=slots, extra={**rows.extra, "reference": values})

    return s.data.map_rows(referred)
