"""Sentence vectors of texts: a pretrained encoder or decoder, its pooling and its tokenizer as one object.

vectors = Encoder.load("all-MiniLM-L6-v2").encode(["A cat sat.", "Ein Hund."])        # [2, 384]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxlm.data.sentences import LENGTH_STEP
from jaxlm.data.tokenizer_hf import HFTokenizer
from jaxlm.evals import encoder_folder
from jaxlm.evals.encoder_folder import Pooling
from jaxlm.models import pooling, sentence_encoder
from jaxlm.models.sentence_encoder import AnyConfig
from jaxlm.typing import Array, Params

POOLERS: dict[str, Callable[[Array, Array], Array]] = {
    "mean": pooling.mean,
    "cls": pooling.first,
    "last": pooling.last,
}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder of sentences: a model that sees both sides of a token (BERT), or a causal one (Llama, Qwen).

    max_tokens: longer texts are cut there. unit: vectors are scaled to length 1. mesh: of the parameters, if they lie
    on one: rows are split over all its devices, and every process calls `encode` with all the texts and gets them all.
    """

    cfg: AnyConfig
    params: Params
    tokenizer: HFTokenizer
    pooling: Pooling = "mean"
    unit: bool = True
    max_tokens: int = 512
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        sentence_encoder.check_pooling(self.cfg, self.pooling)

    @classmethod
    def load(cls, folder: str | Path, *, pooling: Pooling | None = None) -> Encoder:
        """Reads a Hugging Face or sentence-transformers folder of any encoder or decoder that jaxlm imports.

        pooling: None takes what the folder says (1_Pooling/config.json); where it says nothing, the last token of a
        causal language model and the mean of others, as sentence-transformers does. Raises ValueError for a model, a
        pooling or a module that jaxlm does not compute.
        """
        folder = Path(folder)
        cfg = sentence_encoder.load_config(folder)
        found = encoder_folder.read(folder, pooling=pooling)
        sentence_encoder.check_pooling(cfg, found.pooling)  # before the weights, which take their time
        params = sentence_encoder.load(folder)[1]
        limit = min(found.max_tokens or cfg.max_length, cfg.max_length)
        return cls(cfg, params, HFTokenizer(folder), found.pooling, unit=found.unit, max_tokens=limit)

    def on(self, mesh: Mesh) -> Encoder:
        """The same encoder with its parameters on every device of the mesh."""
        replicated = NamedSharding(mesh, PartitionSpec())
        return dataclasses.replace(self, params=jax.device_put(self.params, replicated), mesh=mesh)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load`, sentence-transformers and transformers read, whole or not at all.

        The vectors are the same there; parameters are stored in the dtype that they have, and a tokenizer without
        padding gets its end token for it, which transformers needs. Raises ValueError if the folder exists.
        """
        settings = encoder_folder.Settings(self.pooling, self.unit, self.max_tokens)
        beside = encoder_folder.Beside(self.tokenizer, settings, self.cfg.width)
        sentence_encoder.save(folder, self.params, self.cfg, tokenizer=beside)

    def encode(self, texts: Sequence[str], *, batch_size: int = 32, show_progress: bool = False) -> np.ndarray:
        """Vectors of the texts in their order, float32 [len(texts), D].

        batch_size: rows a call; texts of like length share one, so a vector does not depend on its neighbours but for
        rounding. An empty text has the vector of its special tokens; where the tokenizer adds none, that is 0.
        """
        bad = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
        if isinstance(texts, str) or bad is not None:
            found = "one string" if bad is None else f"{type(texts[bad]).__name__} at {bad}"
            raise ValueError(f"encode takes a sequence of strings, found {found}")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, found {batch_size}")
        tokens = self.tokenizer.encode_sentences(texts, max_tokens=self.max_tokens)
        vectors = np.zeros((len(texts), self.cfg.width), np.float32)
        run = _program(self.cfg, self.pooling, self.unit, self.mesh)
        size = batch_size if self.mesh is None else -(-batch_size // self.mesh.size) * self.mesh.size
        with tqdm(total=len(texts), unit="text", disable=not show_progress) as bar:
            for rows, ids, segments in _batches(tokens, size, self.tokenizer.pad_id, self.cfg.max_length):
                found_vectors = run(self.params, _split(ids, self.mesh), _split(segments, self.mesh))
                vectors[rows] = np.asarray(found_vectors)[: len(rows)]
                bar.update(len(rows))
        return vectors


@cache
def _program(cfg: AnyConfig, pooling: str, unit: bool, mesh: Mesh | None) -> Callable[..., Array]:
    """(params, tokens, segments) -> vectors, compiled; on a mesh every device gets them all."""

    def vectors_of(params: Params, tokens: Array, segments: Array) -> Array:
        hidden = sentence_encoder.forward(params, tokens, cfg=cfg, segments=segments)
        vectors = POOLERS[pooling](hidden, segments != 0).astype(jnp.float32)
        if not unit:
            return vectors
        return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    return jax.jit(vectors_of, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


def _split(rows: np.ndarray, mesh: Mesh | None) -> Any:
    """The rows over all devices of the mesh, whichever process they belong to."""
    if mesh is None:
        return rows
    by_row = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return jax.make_array_from_callback(rows.shape, by_row, lambda index: rows[index])


def _batches(
    tokens: list[np.ndarray], size: int, pad_id: int, max_length: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(which texts, ids [size, T], segments [size, T]), the longest first: if memory ends, it does so at once."""
    order = np.argsort([-len(t) for t in tokens], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        longest = max(len(tokens[rows[0]]), 1)
        length = max(longest, min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_length))  # learned positions end there
        ids, segments = np.full((size, length), pad_id, np.int32), np.zeros((size, length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(tokens[row])] = tokens[row]
            segments[i, : len(tokens[row])] = 1
        yield rows, ids, segments
