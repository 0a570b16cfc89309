"""SimCSE: sentence vectors by contrast, unsupervised, from triples, or from scored pairs.

    jaxlm train --config configs/simcse/unsup.py:DATA

Gao, Yao and Chen 2021, arXiv:2104.08821. `run` is the whole of it, top to bottom. Unsupervised (data.examples
"sentences"): a sentence under two dropout masks is a positive pair, and the others of the batch are negatives.
Supervised ("tuples" of an anchor, its positive, and any number of hard negatives): equation 5. With data.score_field,
pairs and their gold scores: CoSENT, AnglE, or the squared error of the cosine. And for those who have no encoder to
start from, what makes one: guessing masked words (loss "masked_lm").

Deviations: the negatives are those of all devices with gradients through all (the released code's gathered ones carry
none); unsupervised, sentences of the evaluation are left out and repeated ones are one row; the head is dropped
at test time in supervised runs too, where the paper keeps it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.data.sentences import TEXT, SentenceConfig, make_rows, make_sentences, read_examples
from jaxlm.evals import sts
from jaxlm.evals.encode import Encoder, Pooling
from jaxlm.losses import angle, cosent, cosine_mse, simcse
from jaxlm.losses.similarity import matryoshka
from jaxlm.models.config import DecoderConfig, EncoderConfig
from jaxlm.recipes import sentences
from jaxlm.recipes.sentences import Trainer, make_scores
from jaxlm.recipes.sphere_plot import plot_sphere, sphere_points
from jaxlm.recipes.wiring import say
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.train.config import TrainConfig
from jaxlm.train.contrastive import Objective, make_contrastive_loss, pair_metrics
from jaxlm.train.loop import Result
from jaxlm.train.optim import OptimConfig
from jaxlm.train.profile import ProfileConfig
from jaxlm.typing import Array, Batch, LossFn, Metrics

SCORED: dict[str, Callable[..., Array]] = {"cosent": cosent, "angle": angle, "cosine_mse": cosine_mse}
DEV = "dev"

resolve, shrink = sentences.resolve, sentences.shrink


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of SimCSE. What the groups hold is documented where they are defined.

    model, init_from: the fields of an encoder or a decoder, or a Hugging Face folder of either to start from (a decoder
    is causal: pooling last or mean, and no head beside it). loss: simcse, or for scored pairs cosent, angle, cosine_mse
    (the scale of the first two is 1 / temperature; the last divides scores by score_scale); masked_lm, which guesses
    words of sentences and trains no vector. dropout: of the model while it trains. scan_layers: one program for all
    layers, which compiles faster and, on a CPU, trains half as fast. one_mask: both views under the same dropout mask,
    the paper's ablation. train_head: BERT's dense layer and tanh over the pooled state while training; the vectors that
    are kept are without. matryoshka: prefix lengths trained beside the whole. masked_lm_weight: of the masked-LM loss
    on the first column, beside (the paper: 0.1). chunk_size: sentences encoded at a time, see
    `jaxlm.train.gradient_cache`. dev: STS-B's dev file, evaluated on the way as dev/spearman, dev/pearson,
    dev/alignment, dev/uniformity (train.best_metric may name one).
    """

    run_dir: str
    data: SentenceConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig(learning_rate=3e-5, weight_decay=0.0)
    model: EncoderConfig | DecoderConfig | None = None
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()
    recipe: Literal["simcse"] = "simcse"
    loss: Literal["simcse", "cosent", "angle", "cosine_mse", "masked_lm"] = "simcse"
    temperature: float = 0.05
    hard_negative_weight: float = 1.0
    score_scale: float = 5.0
    dropout: float = 0.1
    scan_layers: bool = False
    one_mask: bool = False
    pooling: Pooling = "mean"
    train_head: bool = False
    matryoshka: tuple[int, ...] = ()
    masked_lm_weight: float = 0.0
    chunk_size: int | None = None
    dev: str | None = None

    def __post_init__(self) -> None:
        sentences.check(self)
        scored = self.data.score_field is not None
        if scored != (self.loss in SCORED):
            expected = f"one of {', '.join(SCORED)}" if scored else "simcse or masked_lm"
            raise ValueError(f"loss={self.loss!r} with data.score_field={self.data.score_field!r}: expected {expected}")
        columns = len(self.data.fields) if self.data.examples == "tuples" else 1
        if self.data.examples == "tuples" and (columns < 2 or (scored and columns != 2)):
            raise ValueError(f"data.fields={self.data.fields}: expected two texts a row{'' if scored else ' or more'}")
        guesses = bool(self.masked_lm_weight) or self.loss == "masked_lm"
        if isinstance(self.model, DecoderConfig) and (self.train_head or guesses):
            raise ValueError("train_head and masked words are of encoders, the model is a decoder: leave them out")
        if self.loss == "masked_lm":
            self._check_masked_lm()
        if self.one_mask and self.data.examples != "sentences":
            raise ValueError(
                "one_mask is of the two views of a sentence: leave it out, or set data.examples='sentences'"
            )
        if self.masked_lm_weight and self.chunk_size is not None:
            raise ValueError("masked_lm_weight reads the whole batch at once: leave chunk_size out, or the weight 0")
        if self.train.best_metric is not None and self.dev is None:
            raise ValueError(f"train.best_metric={self.train.best_metric!r} needs an evaluation: give dev, or set None")
        if self.train_head and isinstance(self.model, EncoderConfig) and not self.model.head:
            raise ValueError("train_head needs parameters for it: set model.head=True")
        if guesses and isinstance(self.model, EncoderConfig) and self.model.masked_lm is None:
            raise ValueError("masked words need parameters for the head: set model.masked_lm={}")

    def _check_masked_lm(self) -> None:
        if self.data.examples != "sentences":
            raise ValueError("loss='masked_lm' is of sentences: set data.examples='sentences'")
        vectors_only = ("masked_lm_weight", "train_head", "matryoshka", "chunk_size", "one_mask")
        given = [name for name in vectors_only if getattr(self, name)]
        if given:
            raise ValueError(f"loss='masked_lm' trains no sentence vector: leave out {', '.join(given)}")


def run(cfg: Config) -> Result:
    """Trains, evaluates, reports, and keeps the best encoder; started again on the same run folder, it resumes."""
    cfg = resolve(cfg)
    pairs = None if cfg.dev is None else sts.read_stsb(cfg.dev)
    skipped: collections.Counter[str] = collections.Counter()
    exclude = set() if pairs is None else {text.strip() for text in [*pairs.first, *pairs.second]}
    examples = read_examples(cfg.data, skipped, exclude=exclude)
    trainer = Trainer(cfg, sentences.tokenizer_of(cfg, [t for e in examples for t in e.texts]), cfg.train_head)
    data = make_sentences(
        cfg.data, make_rows(cfg.data, examples, trainer.tokenizer), skipped,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    columns, loss_fn = make_loss(cfg, trainer)
    evaluate = None
    if pairs is not None:
        evaluate = make_scores(trainer, {DEV: lambda encoder: sts.scores(pairs, encoder.encode)})
    result = trainer.train(loss_fn, columns, data, evaluate)
    folder = trainer.keep()
    if pairs is not None and jax.process_index() == 0:
        report(cfg, pairs, folder)
    return result


def make_loss(cfg: Config, trainer: Trainer) -> tuple[tuple[str, ...], LossFn]:
    """The columns that the loss encodes, and the loss."""
    if cfg.loss == "masked_lm":
        return (TEXT,), trainer.masked_lm(TEXT, 1.0)
    columns = cfg.data.fields if cfg.data.examples == "tuples" else (TEXT, TEXT)
    more = trainer.masked_lm(columns[0], cfg.masked_lm_weight) if cfg.masked_lm_weight else None
    return columns, make_contrastive_loss(
        trainer.encode(), columns, make_objective(cfg), chunk_size=cfg.chunk_size, one_mask=cfg.one_mask, more=more
    )


def make_objective(cfg: Config) -> Objective:
    """Vectors of the columns to the loss of each row (or of the batch), and what the batch looks like."""
    if cfg.loss in SCORED:
        scale = {} if cfg.loss == "cosine_mse" else {"scale": 1 / cfg.temperature}
        return partial(scored, loss=_prefixes(cfg, partial(SCORED[cfg.loss], **scale)), score_scale=cfg.score_scale)
    loss = partial(simcse, temperature=cfg.temperature, hard_negative_weight=cfg.hard_negative_weight)
    return partial(contrast, loss=_prefixes(cfg, loss))


def _prefixes(cfg: Config, loss: Callable[..., Array]) -> Callable[..., Array]:
    assert cfg.model is not None  # resolve
    return matryoshka(loss, dims=(*cfg.matryoshka, cfg.model.width)) if cfg.matryoshka else loss


def contrast(vectors: Sequence[Array], batch: Batch, *, loss: Callable[..., Array]) -> tuple[Array, Metrics]:
    """Anchors against positives, and hard negatives where there are columns of them."""
    query, positive, *hard = vectors
    negatives = [jnp.stack(hard, axis=1)] if hard else []
    return loss(query, positive, *negatives), pair_metrics(query, positive)


def scored(
    vectors: Sequence[Array], batch: Batch, *, loss: Callable[..., Array], score_scale: float
) -> tuple[Array, Metrics]:
    """Pairs against their gold scores."""
    return loss(*vectors, score=batch["score"] / score_scale), {}


def report(cfg: Config, pairs: sts.Pairs, folder: Path) -> None:
    """Says what the kept encoder reaches on the dev set beside the lexical baselines, and draws its way there."""
    scores, baselines = sts.scores(pairs, Encoder.load(folder).encode), sts.lexical_baselines(pairs)
    pearson = scores["pearson"]
    say(sts.table([sts.Result("STS-B dev", len(pairs.first), pairs.unrated, scores["spearman"], pearson, baselines)]))
    rows = {"trained": scores} | {name: {"spearman": value} for name, value in baselines.items()}
    run_dir = Path(cfg.run_dir)
    points = sphere_points(run_dir / "metrics.jsonl", DEV)
    if points:
        say(f"alignment and uniformity: {plot_sphere(run_dir / 'metrics.jsonl', run_dir / 'sphere.png', prefix=DEV)}")
    if points and points[0]["step"] == 0:
        rows["start"] = {k: v for k, v in points[0].items() if k != "step"}
    sentences.write_results(
        cfg.run_dir, {name: {f"{DEV}/{k}": v for k, v in row.items()} for name, row in rows.items()}
    )
