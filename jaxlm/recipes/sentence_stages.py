"""The stages of `sentence_by_sentence`: what each trains from what, and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.data.reasoning import newline_id
from jaxlm.data.sentences import SentenceRows
from jaxlm.generate import latent as rolls
from jaxlm.generate.sample import SamplingConfig, generate
from jaxlm.models import decoder, latent, layers
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.latent import LatentConfig
from jaxlm.recipes.sentence_data import Task, TaskConfig, judge, make_batches, sample_rows
from jaxlm.recipes.wiring import averaged, initial_params, make_apply, train_parameters
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.place import check_batch, make_constrain, shard_rows
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.checkpoint import best_step, load_params
from jaxlm.train.config import TrainConfig
from jaxlm.train.latent import Vectors, make_answer_loss, make_latent_loss, make_sentence_loss
from jaxlm.train.objectives import make_hidden_nll
from jaxlm.train.optim import OptimConfig
from jaxlm.train.progress import Throughput
from jaxlm.train.reference import fingerprint
from jaxlm.typing import Array, Batch, LossFn, Params

if TYPE_CHECKING:
    from jaxlm.recipes.sentence_by_sentence import Config, LatentStage, StageConfig

_DROP = 1 << 22  # the stream of the dropout of vectors, outside those of the layers

Kept = Mapping[str, Params]
"""The parameters of the stages that are done, by name."""

Scores = dict[str, dict[str, float]]
"""Rows of the table, one for each way of inference, in percent."""


class Way(NamedTuple):
    """A stage: what it trains, from what, and how it is judged.

    settings: what its loss depends on. needs: the stages before it. initial: the parameters of step 0 (None: random).
    frozen: what the loss reads beside them. judge: (params, part, kept) -> rows. best: the score of those rows that
    checkpoints are chosen by, `<way of inference>/<score>`.
    """

    name: str
    stage: StageConfig
    settings: dict[str, Any]
    needs: tuple[str, ...]
    spec: specs.Spec
    loss: LossFn
    initial: Callable[[Kept], Params | None]
    judge: Callable[[Params, str, Kept], Scores]
    best: str = "accuracy"
    frozen: Callable[[Kept], Params | None] = lambda kept: None


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One stage as the trainer and its record see it; what other stages alone have would forbid to resume.

    settings: of its loss. starts_from: fingerprints of the parameters that it starts from, so that it is not taken for
    done when a stage before it has become another.
    """

    run_dir: str
    settings: dict[str, Any]
    starts_from: dict[str, str]
    model: DecoderConfig
    init_from: str | None
    data: TaskConfig
    train: TrainConfig
    optim: OptimConfig


class Stages:
    """The stages of a config on its mesh."""

    def __init__(self, cfg: Config, task: Task):
        self.cfg, self.task = cfg, task
        assert cfg.model is not None  # resolve
        self.model: DecoderConfig = cfg.model
        self.mesh = make_mesh(cfg.mesh)
        check_batch(self.mesh, batch_size=cfg.data.batch_size, sequence_length=1)
        self.constrain = make_constrain(self.mesh)
        self.head = partial(decoder.head, cfg=self.model)
        self.end_id = newline_id(task.tokenizer)
        if task.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {task.tokenizer.vocab_size} ids and the model only vocab_size="
                f"{self.model.vocab_size}: set model.vocab_size to at least {task.tokenizer.vocab_size}"
            )

    def way(self, name: str) -> Way:
        """The stage of that name: a language model, or an encoder and decoder."""
        return self.language(name) if name in ("direct", "cot") else self.sentences(name)

    def language(self, name: str) -> Way:
        """A language model, which starts at random or from a checkpoint."""
        nll = make_hidden_nll(make_apply(self.model, self.constrain), self.head, mesh=self.mesh)
        return Way(
            name, self.cfg.stages[name], {}, (), decoder.spec(self.model), make_answer_loss(nll),
            initial=lambda kept: initial_params(self.cfg.init_from),
            judge=lambda params, part, kept: {name: self.token_by_token(params, part)},
        )  # fmt: skip

    def sentences(self, name: str) -> Way:
        """An encoder and decoder, which start as one copy of the language model."""
        cfg, exact, contrast = self.cfg, name == "semantic", name == "contrastive"
        settings = {} if exact else {"dropout": cfg.dropout}
        if contrast:
            settings |= {"contrast_weight": cfg.contrast_weight, "temperature": cfg.temperature}
        loss = make_sentence_loss(
            self.vectors[name], self.states, self.head, drop=None if exact else self.drop,
            semantic=self.vectors["semantic"] if contrast else None, contrast_weight=cfg.contrast_weight,
            temperature=cfg.temperature,
        )  # fmt: skip

        def scores(params: Params, part: str, kept: Kept) -> Scores:
            if exact:
                return {name: {"exact": self.reconstructed(params, part)}}
            return {name: judge(self.task, self.task.samples[part], self.texts(self.roll_encoder, part, params))}

        return Way(
            name, cfg.stages[name], settings, ("cot", "semantic") if contrast else ("cot",), decoder.spec(self.model),
            loss, initial=lambda kept: _copy(kept["cot"]), judge=scores, best="exact" if exact else "accuracy",
            frozen=lambda kept: _copy(kept["semantic"]) if contrast else None,
        )  # fmt: skip

    def latent_config(self, stage: LatentStage) -> LatentConfig:
        """The latent model of a stage, as wide as its encoder and decoder."""
        width = self.model.width
        return LatentConfig(self.model, width, width, dropout=self.cfg.dropout, unit_scale=stage.unit_scale)

    def latent(self, stage: LatentStage) -> Way:
        """A latent model between the vectors of a stage, which starts as a copy of the language model."""
        cfg = self.latent_config(stage)
        spec = latent.spec(cfg)

        def predict(params: Params, batch: Batch, vectors: Array, mask: Array, key: Array | None) -> Any:
            question = batch["question/tokens"], batch["question/segments"]
            return latent.predict(params, *question, vectors, mask, cfg=cfg, key=key, constrain=self.constrain)

        def initial(kept: Kept) -> Params:
            return specs.init(jax.random.key(self.cfg.seed), spec) | {"model": _copy(kept["cot"])}

        def scores(params: Params, part: str, kept: Kept) -> Scores:
            found = {}
            for name, roll in (("continuous", self.roll_continuous), ("discretized", self.roll_discretized)):
                texts = self.texts(partial(roll, cfg, stage.vectors), part, params, kept[stage.vectors])
                found[f"{stage.name} {name}"] = judge(self.task, self.task.samples[part], texts)
            return found

        loss = make_latent_loss(
            self.vectors[stage.vectors], predict, self.states, self.head, weights=stage.weights,
            temperature=self.cfg.temperature,
        )  # fmt: skip
        settings = {
            "vectors": stage.vectors, "weights": stage.weights, "unit_scale": stage.unit_scale,
            "dropout": self.cfg.dropout, "temperature": self.cfg.temperature,
        }  # fmt: skip
        return Way(
            stage.name, stage, settings, ("cot", stage.vectors), spec, loss, initial, scores,
            best="continuous/accuracy", frozen=lambda kept: {"encoder": _copy(kept[stage.vectors])},
        )  # fmt: skip

    def train(self, way: Way, kept: Kept) -> Params:
        """Trains a stage, or goes on with it, and gives the parameters of its best validation."""
        cfg, stage = self.cfg, way.stage
        rows = self.rows("train", direct=way.name == "direct")
        every = max(1, -(-stage.num_steps // cfg.evals))
        run = StageRun(
            run_dir=str(Path(cfg.run_dir) / way.name), settings=way.settings,
            starts_from={name: fingerprint(kept[name]) for name in way.needs}, model=self.model,
            init_from=None if way.needs else cfg.init_from, data=cfg.data,
            train=TrainConfig(
                num_steps=stage.num_steps, log_every=20, eval_every=every, checkpoint_every=every,
                best_metric=f"validation/{way.best}", best_mode="max", seed=cfg.seed,
            ),
            optim=OptimConfig(
                learning_rate=stage.learning_rate, schedule="linear", warmup_steps=stage.warmup_steps,
                weight_decay=stage.weight_decay,
            ),
        )  # fmt: skip
        train_parameters(
            run, way.spec, way.loss, mesh=self.mesh,
            data=make_batches(cfg.data, rows, self.task, num_steps=stage.num_steps),
            place=partial(shard_rows, mesh=self.mesh), initial=partial(way.initial, kept), frozen=way.frozen(kept),
            evaluate=partial(self.validate, way, kept),
            speed=Throughput(cfg.data.batch_size * rows.columns["text"].length), row_keys=True,
        )  # fmt: skip
        return self.load(run, way.spec)

    def validate(self, way: Way, kept: Kept, state: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        """`evaluate` of the loop: the scores on the validation samples."""
        if stop():
            return None
        found = way.judge(averaged(state), "validation", kept)
        inference = {row: "/".join(["validation", *row.removeprefix(way.name).split()]) for row in found}
        return {f"{inference[row]}/{k}": v for row, scores in found.items() for k, v in scores.items()}

    def load(self, run: StageRun, spec: specs.Spec) -> Params:
        """The parameters of the best checkpoint, on the mesh."""
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            specs.abstract(spec), param_shardings(spec, self.mesh),
        )  # fmt: skip
        folder = Path(run.run_dir) / "checkpoints"
        return load_params(folder, shapes, step=best_step(folder, run.train.best_metric, run.train.best_mode))

    def rows(self, part: str, *, direct: bool = False) -> SentenceRows:
        """The rows of a part; direct: with the answer alone."""
        if not direct:
            return self.task.rows[part]
        alone = [dataclasses.replace(sample, steps=()) for sample in self.task.samples[part]]
        return sample_rows(self.cfg.data, alone, self.task.tokenizer, part)[0]

    @cached_property
    def vectors(self) -> dict[str, Vectors]:
        """The vectors of all sentences of a batch, by the stage that trains them."""

        def semantic(params: Params, batch: Batch) -> Array:
            tokens, segments = batch["steps"], batch["step_segments"]
            flat = (x.reshape(-1, x.shape[-1]) for x in (tokens, segments))
            found = latent.encode_sentences(params, *flat, cfg=self.model, constrain=self.constrain)
            return found.reshape(*tokens.shape[:2], -1)

        def contextual(params: Params, batch: Batch) -> Array:
            text = batch["text/tokens"], batch["text/segments"], batch["ends"][:, :-1]
            return latent.encode_prefixes(params, *text, cfg=self.model, constrain=self.constrain)

        return {"semantic": semantic, "contextual": contextual, "contrastive": contextual}

    def states(self, params: Params, vectors: Array, tokens: Array, segments: Array) -> Array:
        """The states of the sentence decoder."""
        return latent.decoder_states(params, vectors, tokens, segments, cfg=self.model, constrain=self.constrain)

    def drop(self, vectors: Array, key: Array | None) -> Array:
        """Dropout of contextual vectors before the decoder."""
        return layers.dropout(vectors, self.cfg.dropout, key, _DROP)

    def token_by_token(self, params: Params, part: str) -> dict[str, float]:
        """The scores of what the language model writes after each question, greedily."""
        samples, tokenizer = self.task.samples[part], self.task.tokenizer
        prompts = [np.append(tokenizer.encode_plain(s.question), self.end_id) for s in samples]
        longest = int(max(self.task.rows["train"].extra["step_segments"].sum(axis=(1, 2))))
        found = generate(
            params, prompts, cfg=self.model, tokenizer=tokenizer, constrain=self.constrain, batch_size=64, eos_ids=(),
            sampling=SamplingConfig(max_new_tokens=longest, temperature=0.0),
        )  # fmt: skip
        return judge(self.task, samples, [result.text.split("\n") for result in found])

    def reconstructed(self, params: Params, part: str) -> float:
        """Percent of the different sentences of a part that the autoencoder writes again, token for token."""
        tokens, segments = (self.task.rows[part].extra[name] for name in ("steps", "step_segments"))
        joined = np.stack([np.where(segments != 0, tokens, 0), segments])
        there = segments[..., 0] != 0
        tokens, segments = np.unique(joined[:, there], axis=1)

        def again(params: Params, tokens: Array, segments: Array) -> rolls.Sentences:
            vectors = latent.encode_sentences(params, tokens, segments, cfg=self.model)
            limit = self.cfg.data.max_step_tokens
            return rolls.write(params, vectors, cfg=self.model, end_id=self.end_id, max_tokens=limit)

        found = self._whole(again)(params, tokens, segments)
        return 100 * float(np.mean(np.all(np.asarray(found.tokens) == tokens, axis=1)))

    def texts(self, roll: Callable[..., rolls.Roll], part: str, *params: Params) -> list[list[str]]:
        """The sentences of a roll over the questions of a part."""
        column, decode = self.task.rows[part].columns["question"], self.task.tokenizer.decode
        tokens = np.zeros((len(column.tokens), column.length), np.int32)
        segments = np.zeros_like(tokens)
        for i, ids in enumerate(column.tokens):
            tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
        found = jax.tree.map(np.asarray, self._whole(roll)(*params, tokens, segments).sentences)
        return [
            [decode(t[s != 0]).removesuffix("\n") for t, s in zip(*row)] for row in zip(found.tokens, found.segments)
        ]

    def _whole(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled, its results whole on every device."""
        return jax.jit(function, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    @property
    def _limits(self) -> dict[str, int]:
        limit = self.cfg.data.max_step_tokens
        return dict(num_sentences=self.cfg.num_sentences, end_id=self.end_id, max_tokens=limit)

    def roll_encoder(self, params: Params, question: Array, segments: Array) -> rolls.Roll:
        """Encoder and decoder alone."""
        return rolls.roll_encoder(params, question, segments, cfg=self.model, **self._limits)

    def roll_continuous(
        self, cfg: LatentConfig, vectors: str, params: Params, network: Params, question: Array, segments: Array
    ) -> rolls.Roll:
        """Outputs are fed back as they are, whatever vectors the model was trained on."""
        return rolls.roll_continuous(
            params, network, question, segments, cfg=cfg, decoder_cfg=self.model, **self._limits
        )

    def roll_discretized(
        self, cfg: LatentConfig, vectors: str, params: Params, network: Params, question: Array, segments: Array
    ) -> rolls.Roll:
        """Outputs are written as text, and its vector, or that of what stands before it, is read."""

        def reencode(text: rolls.Text, new: rolls.Sentences) -> Array:
            read = new if vectors == "semantic" else text
            return latent.encode_sentences(network, read.tokens, read.segments, cfg=self.model)

        return rolls.roll_discretized(
            params, network, question, segments, cfg=cfg, decoder_cfg=self.model, reencode=reencode, **self._limits
        )


def _copy(params: Params) -> Params:
    return jax.tree.map(lambda x: x + 0, params)  # the state of the next stage is donated, and these are kept
