"""Reasoning sentence by sentence: a language model that predicts the vector of its next sentence.

    jaxlm train --config configs/sentence_by_sentence/blocksworld.py

Hwang et al. 2025, arXiv:2505.22202. Stages, each a run of the trainer in a folder of its own, so that the same command
goes on where it stopped:

    direct        the answer after the question, token by token (No-CoT)
    cot           the steps and then the answer, token by token; everything below starts from it
    semantic      each sentence from its own vector: an autoencoder
    contextual    each sentence from the vector of all before it (Ctx-B)
    contrastive   the same, its vectors drawn to the semantic ones by InfoNCE (Ctx-C)
    latents       latent models between the vectors of one of these three, encoder and decoder frozen
    curricula     to compare with: continuous thoughts (Coconut) and pause tokens in the place of the steps

and inference: token by token; by encoder and decoder alone; continuous (outputs are fed back as they are) and
discretized (outputs are written as text and read again).

From the paper: stages, objectives, widths of the mappers, dropout, temperatures, and what is fed back. Ours:
checkpoints are chosen on validation samples (a latent's by the mean accuracy of its two ways of inference), where the
paper chose on the test set; negatives of the whole global batch, where the released code has those of one device; and
the term `tie` of the latents' default loss, a squared error that ties the scale of their outputs to that of what they
read, which the paper's cosine leaves free (the paper's loss: weights {nll: 1, info_nce: 1, stop: 1}).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal

import jax

from jaxlm.models.config import DecoderConfig
from jaxlm.models.lora import LoraConfig
from jaxlm.recipes.describe import score_table
from jaxlm.recipes.load import load_config
from jaxlm.recipes.sentence_data import TaskConfig, make_task
from jaxlm.recipes.sentence_lens import write_lens
from jaxlm.recipes.sentence_stages import Stages
from jaxlm.recipes.sentence_table import costs, plot_costs
from jaxlm.recipes.sentences import write_results
from jaxlm.recipes.shrink import fold_mesh, shrink_decoder
from jaxlm.recipes.wiring import say
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.train.profile import ProfileConfig
from jaxlm.typing import Params

KINDS = ("semantic", "contextual", "contrastive")
NEEDS = {"semantic": ("cot",), "contextual": ("cot",), "contrastive": ("cot", "semantic")}
STAGES = ("direct", "cot", *KINDS)
DEFAULT_TERMS = ("nll", "info_nce", "tie", "stop")


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """How long and how fast one stage learns; the schedule is linear after the warm-up."""

    num_steps: int
    learning_rate: float = 5e-4
    warmup_steps: int = 0
    weight_decay: float = 0.01


@dataclasses.dataclass(frozen=True)
class LatentStage(StageConfig):
    """A latent model. name: of its folder and its rows. vectors: the stage whose vectors it predicts. weights: of the
    terms of its loss (`jaxlm.train.latent.make_latent_loss`). unit_scale: see `jaxlm.models.latent.LatentConfig`.
    decoder: the stage that writes its sentences, if it is another (the paper's hybrid reads semantic vectors and writes
    with the contextual decoder).
    """

    name: str = "latent"
    vectors: Literal["semantic", "contextual", "contrastive"] = "contextual"
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(DEFAULT_TERMS, 1.0))
    unit_scale: bool = False
    decoder: Literal["semantic", "contextual", "contrastive"] | None = None


@dataclasses.dataclass(frozen=True)
class Curriculum(StageConfig):
    """A language model taught to answer without steps: stage k of `num_stages` leaves out the first k steps of every
    sample, the last one all, and reads k `thoughts_per_step` vectors in their place. num_steps, rates: of each stage,
    whose optimizer starts anew.

    name: of its row. kind: coconut reads its own last states (Hao et al. 2024), pause one learnt vector.
    """

    name: str = "coconut"
    kind: Literal["coconut", "pause"] = "coconut"
    num_stages: int = 3
    thoughts_per_step: int = 1

    def __post_init__(self) -> None:
        if min(self.num_stages, self.thoughts_per_step) < 1:
            raise ValueError(f"{self.name}: num_stages and thoughts_per_step must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run of the stages that `stages` names, in their order, and of the latents.

    model: the decoder that every network is a copy of; init_from: a Hugging Face folder to start from instead. dropout:
    around the mappers of a latent, and of contextual vectors before the decoder. contrast_weight, temperature: of
    InfoNCE. num_sentences: rolled at inference, at most. stop_cosine: adds rows of continuous rolls that end where an
    output's cosine with the one before it is beyond; rows that the classifier ends are there where it was trained.
    evals: validations of a stage, the best of which is kept. lens: test questions of which lens.html shows every layer
    of the first latent. lora: adapters for the stages after cot, whose model is then frozen (mappers are trained whole;
    curricula have none). bucket, sparse_core: as in a TrainConfig. seed: of parameters and dropout.
    """

    run_dir: str
    data: TaskConfig
    stages: dict[str, StageConfig]
    model: DecoderConfig | None = None
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()
    recipe: Literal["sentence_by_sentence"] = "sentence_by_sentence"
    latents: tuple[LatentStage, ...] = ()
    curricula: tuple[Curriculum, ...] = ()
    lora: LoraConfig | None = None
    dropout: float = 0.2
    contrast_weight: float = 0.5
    temperature: float = 0.1
    num_sentences: int = 10
    stop_cosine: float | None = None
    lens: int = 0
    evals: int = 4
    bucket: str | None = None
    sparse_core: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = sorted(set(self.stages) - set(STAGES))
        if unknown or not self.stages:
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}; found {', '.join(unknown) or 'none'}")
        needs = {name: NEEDS.get(name, ()) for name in self.stages} | {
            x.name: ("cot", x.vectors, x.decoder or x.vectors) for x in self.latents
        } | {x.name: ("cot",) for x in self.curricula}
        for name, needed in needs.items():
            lacking = ", ".join(stage for stage in needed if stage not in self.stages)
            if lacking:
                raise ValueError(f"{name} starts from stages that are not there: add stages.{lacking}")
        stages = [f"{x.name}-{i + 1}" for x in self.curricula for i in range(x.num_stages)]
        names = [*self.stages, *(x.name for x in (*self.latents, *self.curricula)), *stages]
        if len(set(names)) != len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
            raise ValueError(
                f"latents, curricula: expected names of their own that a folder can have, found {', '.join(names)}"
            )


def resolve(cfg: Config) -> Config:
    """Fills in the model from `init_from`; ValueError if neither is given."""
    if cfg.model is not None:
        return cfg
    if cfg.init_from is None:
        raise ValueError("config: give model (the decoder's fields) or init_from (a Hugging Face folder)")
    return dataclasses.replace(cfg, model=load_config(cfg.init_from))


def shrink(cfg: Config) -> Config:
    """The same stages with a small random model, two rows a device and few steps, on a folded mesh."""
    mesh = fold_mesh(cfg.mesh)
    rows = 2 * mesh.slice * (mesh.data or 1) * mesh.fsdp

    def short(stage: Any) -> Any:
        return dataclasses.replace(stage, num_steps=2, warmup_steps=min(stage.warmup_steps, 1))

    assert cfg.model is not None  # resolve
    return dataclasses.replace(
        cfg, run_dir=f"{cfg.run_dir}-shrunk", init_from=None, model=shrink_decoder(cfg.model), mesh=mesh,
        stages={name: short(stage) for name, stage in cfg.stages.items()}, latents=tuple(map(short, cfg.latents)),
        curricula=tuple(map(short, cfg.curricula)),
        evals=1, num_sentences=2,
        data=dataclasses.replace(cfg.data, batch_size=rows, num_validation=4, num_test=4, num_samples=64),
    )  # fmt: skip


def run(cfg: Config) -> dict[str, dict[str, float]]:
    """Trains every stage, judges it on the test samples, and writes the table; started again, it goes on.

    Returns the rows of the table: scores in percent, and costs (`costs`).
    """
    cfg = resolve(cfg)
    task = make_task(cfg.data, Path(cfg.run_dir) / "tokenizer")
    say(", ".join(f"{part}: {len(samples):,} samples" for part, samples in task.samples.items()))
    example = task.samples["train"][0]
    say("\n".join(["first sample:", example.question, *example.sentences]))
    stages = Stages(cfg, task)
    kept: dict[str, Params] = {}
    rows: dict[str, dict[str, float]] = {}
    for way in stages.ways():
        say(f"=== {way.name}")
        kept[way.name] = stages.train(way, kept)
        found = way.judge(kept[way.name], "test", kept)
        for row, scores in found.items():  # now: what stops the run later does not lose it
            say(f"test, {row}: " + ", ".join(f"{name} {score:.1f}" for name, score in scores.items()))
        rows |= found
    for name, cost in costs(cfg, task, rows).items():
        rows[name] = rows[name] | cost
    if jax.process_index() == 0:
        write_results(cfg.run_dir, rows)
        plot_costs(rows, Path(cfg.run_dir) / "flops.png")
        say(score_table(rows, digits=1))
    if cfg.lens and cfg.latents:
        first = cfg.latents[0]
        path = write_lens(
            stages, stages.latent_config(first), kept[first.name], kept[first.vectors], number=cfg.lens,
            folder=Path(cfg.run_dir), title=f"{cfg.data.task}: {first.name}",
        )  # fmt: skip
        say(f"every layer as sentences: {path}")
    return rows
