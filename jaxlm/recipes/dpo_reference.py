"""The reference's log-probabilities beside the data: one pass over every set, kept for the next run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.loader import Rows, eval_batches
from jaxlm.recipes.wiring import say
from jaxlm.train.preference import Responses
from jaxlm.train.reference import cached, fingerprint, reference_logprobs
from jaxlm.typing import Batch, Params


def with_reference(
    data: pipeline.Datasets,
    score: Callable[[Params, Batch], Responses],
    params: Params,
    cfg: DataConfig,
    *,
    options: Mapping[str, Any],
    folder: Path,
    place: Callable[[Any], Batch],
) -> pipeline.Datasets:
    """The data with the field `reference`: each response's summed log-probability under `params`.

    Computed in one pass per data set, or found in the folder under a key of the parameters, the data set and the
    options (JSON values), all that changes the numbers. score: jitted, see `make_score_step`.
    """
    size = cfg.eval_batch_size or cfg.batch_size
    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    shape = {"sequence_length": cfg.sequence_length, "batch_size": size, "packing": cfg.packing, "group": cfg.group}
    # Another compiler or device rounds differently, and the first evaluation would not be exact.
    machine = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    slots = data.slots
    key = {**options, **shape, **machine, "slots": slots, "parameters": fingerprint(params)}

    def referred(rows: Rows) -> Rows:
        def compute() -> np.ndarray:
            found = reference_logprobs(
                lambda batch: score(params, batch).logprob,
                eval_batches(rows, batch_size=size, **hosts),
                place=place,
                total=-(-len(rows.plan) // size),
                name=rows.name,
            )
            return _by_document(rows, found)

        entry = key | {"data": rows.corpus.fingerprint()}
        values, before = cached(folder, entry, compute, size=len(rows.corpus))
        say(f"reference log-probabilities of {rows.name}: {'found' if before else 'computed'}, {folder}")
        return rows._replace(slots=slots, extra={**rows.extra, "reference": values})

    return data.map_rows(referred)


def _by_document(rows: Rows, by_row: np.ndarray) -> np.ndarray:
    """[rows, slots] as one value per document of the corpus."""
    values = np.zeros(len(rows.corpus), np.float32)
    for i in range(len(rows.plan)):
        documents = [piece.document for piece in rows.pieces(i)]
        values[documents] = by_row[i, : len(documents)]
    return values
