"""What `jaxlm plan` compiles of each recipe: its training step, for batches of the shapes that its config gives."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm.data.batch import FIELDS
from jaxlm.data.reasoning import Sample
from jaxlm.data.sentences import LENGTH_STEP
from jaxlm.data.tokenizer import ByteTokenizer
from jaxlm.models import decoder, sentence_encoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.lora import lora_spec
from jaxlm.recipes import dpo, lm, sentence_by_sentence, simcse
from jaxlm.recipes.sentence_data import Task, make_batches, sample_rows
from jaxlm.recipes.sentence_stages import Stages, Way
from jaxlm.recipes.sentences import Trainer
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.place import check_batch
from jaxlm.sharding.rules import batch_sharding, param_shardings, partition_spec
from jaxlm.train import flops
from jaxlm.typing import LossFn, Params

SLOTS = 16
"""Responses of a packed row of preferences; what they cost is next to nothing."""


class Work(NamedTuple):
    """A training step to be. run: the groups train, optim, data of a config. frozen: what the loss reads beside the
    parameters. model_flops: of a step, by `flops.DEFINITION`, each product counted once forward and once for each
    gradient that training needs. tokens: that a step reads. assumed: of what only the data would tell."""

    run: Any
    spec: specs.Spec
    loss: LossFn
    batch: Mapping[str, jax.ShapeDtypeStruct]
    row_keys: bool
    model_flops: float
    tokens: int
    frozen: Params | None = None
    assumed: str = ""


def language_work(cfg: lm.Config, mesh: Mesh, stage: str | None) -> Work:
    """Of pretraining and fine-tuning."""
    model = _decoder(cfg.model)
    spec, rows, length = decoder.spec(model), cfg.data.batch_size, cfg.data.sequence_length
    _check_token_batch(cfg, mesh)
    loss = lm.make_loss(cfg, model, mesh)
    work = rows * length * _per_token(spec, model, length)
    return Work(cfg, spec, loss, _token_batch(rows, length, mesh), model.dropout > 0, work, rows * length)


def preference_work(cfg: dpo.Config, mesh: Mesh, stage: str | None) -> Work:
    """Of DPO and its kin, the reference cached or live, with adapters or without."""
    model = _decoder(cfg.model)
    spec, rows, length = decoder.spec(model), cfg.data.batch_size, cfg.data.sequence_length
    _check_token_batch(cfg, mesh)
    loss = dpo.make_loss(cfg, dpo.make_response_scorer(cfg, model, mesh, slots=SLOTS, capacity=None))
    live = cfg.needs_reference and cfg.reference == "live"
    batch = _token_batch(rows, length, mesh)
    if cfg.needs_reference and not live:
        batch["reference"] = _by_row((rows, SLOTS), np.float32, mesh)
    passes = (2 if cfg.lora else 3) + live  # no gradient of frozen kernels; the reference is read forward alone
    work = rows * length * _per_token(spec, model, length) * passes / 3
    return Work(
        cfg, spec if cfg.lora is None else lora_spec(spec, cfg.lora), loss, batch, model.dropout > 0, work,
        rows * length, abstract_params(spec, mesh) if live or cfg.lora else None,
        f"{SLOTS} responses in a row, no prompts",
    )  # fmt: skip


def contrastive_work(cfg: simcse.Config, mesh: Mesh, stage: str | None) -> Work:
    """Of SimCSE, every text as long as data.max_tokens allows."""
    assert cfg.model is not None  # resolve
    words: Any = SimpleNamespace(mask_id=0, vocab_size=cfg.model.vocab_size, special_ids=())
    trainer = Trainer(cfg, words, cfg.train_head, mesh)
    columns, loss = simcse.make_loss(cfg, trainer)
    rows, length = cfg.data.batch_size, -(-cfg.data.max_tokens // LENGTH_STEP) * LENGTH_STEP
    names = [f"{column}/{field}" for column in dict.fromkeys(columns) for field in ("tokens", "segments")]
    batch = {name: _by_row((rows, length), np.int32, mesh) for name in names}
    if cfg.data.score_field is not None:
        batch["score"] = _by_row((rows,), np.float32, mesh)
    spec, tokens = sentence_encoder.spec(cfg.model), rows * length * len(columns)
    kernels = sum(math.prod(p.shape) for path, p in specs.flatten(spec).items() if path.endswith("/kernel"))
    attention = 12 * cfg.model.num_layers * cfg.model.width * length  # every token sees all of its text
    work = tokens * (6.0 * kernels + attention)
    return Work(cfg, spec, loss, batch, True, work, tokens, assumed=f"every text has {length} tokens")


def sentence_work(cfg: sentence_by_sentence.Config, mesh: Mesh, stage: str | None) -> Work:
    """Of one stage of reasoning by sentences, every sample as long as the limits of the data allow."""
    task = _longest_samples(cfg)
    stages = Stages(dataclasses.replace(cfg, data=_without_files(cfg)), task, mesh)
    ways = {way.name: way for way in stages.ways()}
    name = stage or (cfg.latents[0].name if cfg.latents else list(ways)[-1])
    if name not in ways:
        raise ValueError(f"--stage {name}: expected one of {', '.join(ways)}")
    way = ways[name]
    found = make_batches(stages.cfg.data, task.rows["train"], task, num_steps=1).train.batch(0)
    batch = {key: _by_row(x.shape, x.dtype, mesh) for key, x in found.items()}
    sentences = batch["steps"].shape[:2]
    for field in way.vectors:
        batch[field] = _by_row((*sentences, stages.model.width), np.dtype(stages.model.dtype), mesh)
    tokens, work = _sentence_flops(cfg, stages.model, way, batch)
    return Work(
        stages.configured(way, {}), way.spec, way.loss, batch, True, work, tokens, _frozen(way, stages, mesh),
        f"stage {name}; every sample fills the limits: {sentences[1]} sentences of {batch['steps'].shape[2]} tokens",
    )  # fmt: skip


WORK: dict[str, Callable[[Any, Mesh, str | None], Work]] = {
    "lm": language_work, "dpo": preference_work, "simcse": contrastive_work, "sentence_by_sentence": sentence_work,
}  # fmt: skip
"""By recipe: (resolved config, mesh, stage) -> its training step. stage: of the recipe that has several."""


def make_work(cfg: Any, found: Sequence[Any], stage: str | None = None) -> tuple[Work, Mesh]:
    """The training step of a resolved config on those devices; ValueError for a recipe that has none."""
    if cfg.recipe not in WORK:
        raise ValueError(f"jaxlm plan knows the recipes {', '.join(WORK)}; found {cfg.recipe!r}")
    if stage is not None and cfg.recipe != "sentence_by_sentence":
        raise ValueError(f"--stage is of the recipe sentence_by_sentence, found {cfg.recipe!r}: leave it out")
    mesh = make_mesh(cfg.mesh, found)
    return WORK[cfg.recipe](cfg, mesh, stage), mesh


def _decoder(model: Any) -> DecoderConfig:
    assert isinstance(model, DecoderConfig)  # resolve
    return model


def _check_token_batch(cfg: lm.Config | dpo.Config, mesh: Mesh) -> None:
    check_batch(
        mesh, batch_size=cfg.data.batch_size, num_microbatches=cfg.train.num_microbatches,
        sequence_length=cfg.data.sequence_length,
    )  # fmt: skip


def _token_batch(rows: int, length: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    whole = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=whole) for name, dtype in FIELDS.items()}


def _by_row(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(("batch",))))


def abstract_params(spec: specs.Spec, mesh: Mesh) -> Params:
    """Parameters on a mesh, as shapes with shardings."""
    shapes, shardings = specs.abstract(spec), param_shardings(spec, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _per_token(spec: specs.Spec, model: DecoderConfig, length: int) -> float:
    return flops.flops_per_token(
        spec, sequence_length=length, num_layers=model.num_layers, num_heads=model.num_heads, head_dim=model.head_dim
    )


def _without_files(cfg: sentence_by_sentence.Config) -> Any:
    return dataclasses.replace(cfg.data, task="blocksworld", tokenizer="bytes", train=None, validation=None, test=None)


def _longest_samples(cfg: sentence_by_sentence.Config) -> Task:
    """A batch of samples of as many bytes, which are tokens, as the limits of the config allow."""
    data, words = _without_files(cfg), ByteTokenizer()
    step = "s" * (data.max_step_tokens - 1)
    answer = "a" * max(1, data.max_step_tokens - 5)  # behind its mark
    sample = Sample("q" * (data.max_question_tokens - 1), (step,) * (data.max_steps - 1), answer)
    samples = {"train": [sample] * data.batch_size}
    rows = {part: sample_rows(data, found, words, part)[0] for part, found in samples.items()}
    return Task(words, samples, rows, collections.Counter(), None)


def _sentence_flops(
    cfg: sentence_by_sentence.Config, model: DecoderConfig, way: Way, batch: Mapping[str, Any]
) -> tuple[int, float]:
    """Tokens of a step, and its model FLOPs: of the network that reads questions or texts, and of the one that writes
    sentences from vectors. Mappers are left out."""
    spec, written = decoder.spec(model), math.prod(batch["steps"].shape)
    rows, longest = batch["text/tokens"].shape
    if not ({"vectors"} & set(way.vectors) or way.name in ("semantic", "contextual", "contrastive")):
        return rows * longest, rows * longest * _per_token(spec, model, longest)
    share = 2 / 3 if cfg.lora else 1.0
    table = model.vocab_size * model.width
    if "vectors" in way.vectors:
        length = batch["question/tokens"].shape[1] + batch["steps"].shape[1]
        reading = rows * length * (_per_token(spec, model, length) - 6 * table) * share
        return rows * length + written, reading + written * _per_token(spec, model, batch["steps"].shape[2]) * 2 / 3
    read = written if way.name == "semantic" else rows * longest
    reading = read * (_per_token(spec, model, longest) - 6 * table) * share
    return read + written, reading + written * _per_token(spec, model, batch["steps"].shape[2]) * share


def _frozen(way: Way, stages: Stages, mesh: Mesh) -> Params | None:
    """What the stage's loss reads beside its parameters, as shapes: one or several copies of the model."""
    spec = decoder.spec(stages.model)
    shapes, placed = specs.abstract(spec), abstract_params(spec, mesh)
    found = jax.eval_shape(lambda model: way.frozen(collections.defaultdict(lambda: model)), shapes)

    def place(tree: Any) -> Any:
        same = jax.tree.structure(tree) == jax.tree.structure(placed)
        return placed if same else {name: place(part) for name, part in tree.items()}

    return None if found is None else place(found)
