"""MED-SE: sentence vectors of clinical text from the definitions of medical entities.

    jaxlm train --config configs/medse/small.py:DATA

Hwang, Yoo and Choi 2022, arXiv:2212.04734. Taken from the paper: contrastive training without labels that uses the
definitions of medical entities, and an evaluation centred on entities, in which plain SimCSE gets worse. Ours, since
the paper's abstract does not give them: the objective below, the source of definitions (an ontology), the training
text (names, synonyms, and the mentions in the definitions of other concepts), and the evaluation (retrieving the
definition of a concept that was never trained on, by its name; and EHR-RelB). No figure here is one of the paper's.

    loss = InfoNCE( f(x, z), f(x, z') )                                  dropout
         + definition_weight InfoNCE( f(x with the mention masked), f(definition) )
         + reworded_weight   InfoNCE( f(x), f(x with another form of the mention) )

x: a text that mentions a concept. Rows whose concepts are the same, or one an ancestor of the other by is_a, are no
negatives of each other.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from jaxlm.data.entities import Dictionary
from jaxlm.data.ontology import Ontology, read_obo
from jaxlm.data.sentences import Sentences, make_sentences
from jaxlm.evals.encode import Encoder, Pooling
from jaxlm.evals.entities import Definitions, lexical_scores, read_ehr_rel, relatedness, retrieval
from jaxlm.evals.sts import Pairs
from jaxlm.losses import info_nce
from jaxlm.models.sentence_encoder import AnyConfig
from jaxlm.recipes import sentences
from jaxlm.recipes.describe import score_table
from jaxlm.recipes.medse_data import OntologyConfig, defined, make_med_rows, training_rows, whole
from jaxlm.recipes.sentences import Trainer, make_scores
from jaxlm.recipes.wiring import say
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.train.config import TrainConfig
from jaxlm.train.contrastive import make_contrastive_loss, pair_metrics
from jaxlm.train.loop import Result
from jaxlm.train.optim import OptimConfig
from jaxlm.train.profile import ProfileConfig
from jaxlm.typing import Array, Batch, Bool, Int, Metrics

resolve, shrink = sentences.resolve, sentences.shrink


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of MED-SE. What the groups hold is documented where they are defined.

    init_from, model, dropout, scan_layers, pooling, chunk_size: as in the recipe `simcse`. definition_weight,
    reworded_weight: of the two terms beside dropout's; with both 0 this is SimCSE on the same texts. mask_related:
    related concepts are no negatives of each other. ehr_rel: EHR-RelB.tsv, evaluated at the end and never chosen by.
    On the way, dev/mrr and dev/recall@1 are of definitions of concepts that are held out (train.best_metric).
    """

    run_dir: str
    data: OntologyConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig(learning_rate=3e-5, weight_decay=0.0)
    model: AnyConfig | None = None
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()
    recipe: Literal["medse"] = "medse"
    temperature: float = 0.05
    definition_weight: float = 1.0
    reworded_weight: float = 1.0
    mask_related: bool = True
    dropout: float = 0.1
    scan_layers: bool = False
    pooling: Pooling = "mean"
    chunk_size: int | None = None
    ehr_rel: str | None = None

    def __post_init__(self) -> None:
        sentences.check(self)
        for name in ("definition_weight", "reworded_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, found {getattr(self, name)}")


def run(cfg: Config) -> Result:
    """Trains, evaluates, reports, and keeps the best encoder; started again on the same run folder, it resumes."""
    cfg = resolve(cfg)
    ontology = read_obo(cfg.data.ontology)
    pairs = None if cfg.ehr_rel is None else read_ehr_rel(cfg.ehr_rel)
    trainer = Trainer(cfg, sentences.tokenizer_of(cfg, training_texts(cfg, ontology)))
    data = make_data(cfg, ontology, trainer)
    loss_fn = make_contrastive_loss(
        trainer.encode(), columns_of(cfg), partial(objective, cfg=cfg), chunk_size=cfg.chunk_size
    )
    dev = definitions_of(cfg, ontology, "heldout")
    result = trainer.train(
        loss_fn, columns_of(cfg), data, make_scores(trainer, {"dev": lambda e: retrieval(dev, e.encode)})
    )
    folder = trainer.keep()
    if jax.process_index() == 0:
        report(cfg, ontology, pairs, folder)
    return result


def training_texts(cfg: Config, ontology: Ontology) -> Iterator[str]:
    """What a tokenizer may be trained on: names and definitions of the training part."""
    for concept in defined(cfg.data, ontology, "train"):
        term = ontology.terms[concept]
        yield from (term.name, term.definition or "")


def make_data(cfg: Config, ontology: Ontology, trainer: Trainer) -> Sentences:
    """The rows of training, in batches."""
    dictionary = Dictionary.of_ontology(ontology, ambiguous="leave_out")
    mask = trainer.tokenizer.special_tokens.get("mask_token")
    if mask is None:
        raise ValueError(f"the tokenizer {cfg.data.tokenizer!r} has no mask_token: MED-SE masks mentions by it")
    skipped = collections.Counter({"ambiguous forms": dictionary.num_ambiguous})
    rows = training_rows(cfg.data, ontology, dictionary, mask=mask)
    rows = whole(cfg.data, rows, trainer.tokenizer, skipped)
    return make_sentences(
        cfg.data, make_med_rows(cfg.data, rows, ontology, trainer.tokenizer), +skipped,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip


def columns_of(cfg: Config) -> tuple[str, ...]:
    """The columns that the terms of the loss need, `text` twice."""
    definition = ("masked", "definition") if cfg.definition_weight else ()
    return ("text", "text", *definition, *(("reworded",) if cfg.reworded_weight else ()))


def objective(vectors: Sequence[Array], batch: Batch, *, cfg: Config) -> tuple[Array, Metrics]:
    """The sum of the terms for each row, and each term by itself."""
    first, second, *others = vectors
    found = dict(zip(columns_of(cfg)[2:], others))
    related = are_related(batch["concept"], batch["ancestors"]) if cfg.mask_related else None
    nce = partial(info_nce, temperature=cfg.temperature, negative_mask=None if related is None else ~related)
    terms = {"dropout_loss": nce(first, second)}
    if cfg.definition_weight:
        terms["definition_loss"] = cfg.definition_weight * nce(found["masked"], found["definition"])
    if cfg.reworded_weight:
        terms["reworded_loss"] = cfg.reworded_weight * batch["has_reworded"] * nce(first, found["reworded"])
    rows = jnp.float32(first.shape[0])
    metrics: Metrics = {name: (jnp.sum(x), rows) for name, x in terms.items()}
    return sum(terms.values(), start=jnp.zeros(())), metrics | pair_metrics(first, second)


def are_related(concept: Int[Array, "B"], ancestors: Int[Array, "B A"]) -> Bool[Array, "B B"]:
    """Whether two rows' concepts are the same, or one is an ancestor of the other.

    concept: [B] numbers; ancestors: [B, A] those above, -1 for none.

    >>> import jax.numpy as jnp
    >>> are_related(jnp.array([0, 1, 2]), jnp.array([[-1], [0], [-1]])).astype(int).tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    above = jnp.any(concept[:, None, None] == ancestors[None, :, :], axis=-1)
    return above | above.T | (concept[:, None] == concept[None, :])


def definitions_of(cfg: Config, ontology: Ontology, part: str) -> Definitions:
    """Names to find the definitions of, in one part of the concepts."""
    terms = [ontology.terms[c] for c in defined(cfg.data, ontology, part)]
    return Definitions([t.name for t in terms], [t.definition or "" for t in terms])


def report(cfg: Config, ontology: Ontology, pairs: Pairs | None, folder: Path) -> None:
    """Says, and writes to results.json, what start, run and the lexical baselines reach on the test sets."""
    test = definitions_of(cfg, ontology, "test")

    def scores(encode: Callable[..., Array]) -> dict[str, float]:
        found = {f"definitions/{name}": value for name, value in retrieval(test, encode).items()}
        return found | ({} if pairs is None else {"ehr_rel/spearman": relatedness(pairs, encode)})

    rows = dict(lexical_scores(test, pairs))
    if cfg.init_from is not None:
        rows["start"] = scores(Encoder.load(cfg.init_from, pooling=cfg.pooling).encode)
    rows["trained"] = scores(Encoder.load(folder).encode)
    say(score_table(rows))
    sentences.write_results(cfg.run_dir, rows)
