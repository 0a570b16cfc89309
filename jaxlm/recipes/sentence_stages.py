"""The stages of `sentence_by_sentence`: what each trains from what, and how it is judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlm.data.loader import eval_batches
from jaxlm.data.sentences import SentenceRows
from jaxlm.generate import latent as rolls
from jaxlm.models import decoder, latent, layers, thoughts
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.latent import LatentConfig
from jaxlm.recipes.sentence_data import Task, TaskConfig, fitted, make_batches, most_sentences, sample_rows
from jaxlm.recipes.sentence_inference import Inference
from jaxlm.recipes.sentence_lora import adapted
from jaxlm.recipes.wiring import averaged, initial_params, make_apply, train_parameters
from jaxlm.sharding.mesh import make_mesh
from jaxlm.sharding.place import check_batch, make_constrain, shard_rows
from jaxlm.sharding.rules import batch_parts, param_shardings
from jaxlm.train.bucket import CHECKPOINTS, home
from jaxlm.train.checkpoint import best_step, latest_step, load_params
from jaxlm.train.config import TrainConfig
from jaxlm.train.latent import Vectors, make_answer_loss, make_latent_loss, make_sentence_loss, make_thoughts_loss
from jaxlm.train.objectives import make_head_stats, make_hidden_nll
from jaxlm.train.optim import OptimConfig
from jaxlm.train.profile import ProfileConfig
from jaxlm.train.progress import Throughput
from jaxlm.train.reference import fingerprint, map_rows
from jaxlm.typing import Array, Batch, LossFn, Params

if TYPE_CHECKING:
    from jaxlm.recipes.sentence_by_sentence import Config, Curriculum, LatentStage, StageConfig

_DROP = 1 << 22  # the stream of the dropout of vectors, outside those of the layers

Kept = Mapping[str, Params]
"""The parameters of the stages that are done, by name."""

Scores = dict[str, dict[str, float]]
"""Rows of the table, one for each way of inference, in percent."""


class Way(NamedTuple):
    """A stage: what it trains, from what, and how it is judged.

    settings: what its loss depends on. needs: the stages before it. initial: the parameters of step 0 (None: random).
    frozen: what the loss reads beside them. vectors: fields of the batches, and the stages whose vectors they are.
    judge: (params, part, kept) -> rows. best: the score of those rows that checkpoints are chosen by; `accuracy` of
    several ways of inference is their mean. skip: steps at the front of a sample that it never sees. whole: the
    parameters that later stages start from, out of those that are trained (adapters are merged).
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
    vectors: Mapping[str, str] = MappingProxyType({})
    skip: int = 0
    whole: Callable[[Params, Kept], Params] = lambda params, kept: params


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
    profile: ProfileConfig


class Stages:
    """The stages of a config on its mesh (None: of all devices that are here)."""

    def __init__(self, cfg: Config, task: Task, mesh: Mesh | None = None):
        self.cfg, self.task = cfg, task
        assert cfg.model is not None  # resolve
        self.model: DecoderConfig = cfg.model
        self.mesh = mesh or make_mesh(cfg.mesh)
        check_batch(self.mesh, batch_size=cfg.data.batch_size, sequence_length=1)
        self.constrain = make_constrain(self.mesh)
        self.head = partial(decoder.head, cfg=self.model)
        self.stats = make_head_stats(self.head, self.mesh)
        self.capacity = cache(self._capacity)
        self.ask = Inference(
            self.model, task, self.mesh, self.constrain, num_sentences=cfg.num_sentences,
            max_tokens=cfg.data.max_step_tokens,
        )  # fmt: skip
        if task.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"the tokenizer has {task.tokenizer.vocab_size} ids and the model only vocab_size="
                f"{self.model.vocab_size}: set model.vocab_size to at least {task.tokenizer.vocab_size}"
            )

    def ways(self) -> list[Way]:
        """All stages of the config, in the order in which they start from one another."""
        cfg = self.cfg
        language = [self.language(name) for name in ("direct", "cot") if name in cfg.stages]
        kinds = [self.sentences(name) for name in ("semantic", "contextual", "contrastive") if name in cfg.stages]
        above = [self.latent(x) for x in cfg.latents]
        if cfg.lora is not None:
            settings = {"lora": dataclasses.asdict(cfg.lora)}
            with_lora = [adapted(way, cfg.lora, seed=cfg.seed) for way in kinds + above]
            kinds, above = [way._replace(settings=way.settings | settings) for way in with_lora], []
        return language + kinds + above + [way for x in cfg.curricula for way in self.curriculum(x)]

    def language(self, name: str) -> Way:
        """A language model, which starts at random or from a checkpoint."""
        nll = make_hidden_nll(make_apply(self.model, self.constrain), self.head, mesh=self.mesh)
        return Way(
            name, self.cfg.stages[name], {}, (), decoder.spec(self.model), make_answer_loss(nll),
            initial=lambda kept: initial_params(self.cfg.init_from),
            judge=lambda params, part, kept: {name: self.ask.token_by_token(params, part)},
            skip=self.cfg.data.max_steps if name == "direct" else 0,
        )  # fmt: skip

    def curriculum(self, stage: Curriculum) -> list[Way]:
        """Stages that start from one another; each takes another step away and has more thoughts in its place."""
        return [self.thoughts(stage, steps) for steps in range(1, stage.num_stages + 1)]

    def thoughts(self, stage: Curriculum, steps: int) -> Way:
        """A language model that thinks in the place of the first steps; the first one starts from the chain of thought.

        Only the last one gives a row, since it alone has no steps left.
        """
        number, pause, last = steps * stage.thoughts_per_step, stage.kind == "pause", steps == stage.num_stages
        before, spec = f"{stage.name}-{steps - 1}" if steps > 1 else "cot", thoughts.spec(self.model, pause=pause)
        room = int(max(self.task.rows["train"].extra["step_segments"].sum(axis=(1, 2))))
        states_after = partial(thoughts.states_after, cfg=self.model, number=number, constrain=self.constrain)
        head = lambda params: self.head(params["model"])  # noqa: E731

        def initial(kept: Kept) -> Params:
            if steps > 1:
                return _copy(kept[before])
            return specs.init(jax.random.key(self.cfg.seed), spec) | {"model": _copy(kept["cot"])}

        def scores(params: Params, part: str, kept: Kept) -> Scores:
            if part == "test" and not last:
                return {}
            return {stage.name if part == "test" else way.name: self.ask.after_thoughts(number, room, part, params)}

        way = Way(
            f"{stage.name}-{steps}", stage, {"kind": stage.kind, "thoughts": number, "skip": steps}, (before,), spec,
            make_thoughts_loss(states_after, head, room=room, mesh=self.mesh), initial, scores,
            skip=self.cfg.data.max_steps if last else steps,
        )  # fmt: skip
        return way

    def sentences(self, name: str) -> Way:
        """An encoder and decoder, which start as one copy of the language model."""
        cfg, exact, contrast = self.cfg, name == "semantic", name == "contrastive"
        settings = {} if exact else {"dropout": cfg.dropout}
        if contrast:
            settings |= {"contrast_weight": cfg.contrast_weight, "temperature": cfg.temperature}
        loss = make_sentence_loss(
            self.vectors[name], self.states, self.stats, drop=None if exact else self.drop,
            contrast_weight=cfg.contrast_weight if contrast else None, temperature=cfg.temperature,
            capacity=self.capacity(cfg.stages[name].num_steps),
        )  # fmt: skip

        def scores(params: Params, part: str, kept: Kept) -> Scores:
            if exact:
                return {name: {"exact": self.ask.reconstructed(params, part)}}
            return {name: self.ask.rolled(self.ask.encoder, part, params)}

        return Way(
            name, cfg.stages[name], settings, ("cot", "semantic") if contrast else ("cot",), decoder.spec(self.model),
            loss, initial=lambda kept: _copy(kept["cot"]), judge=scores, best="exact" if exact else "accuracy",
            vectors={"semantic": "semantic"} if contrast else {},
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

        writer = stage.decoder or stage.vectors

        def scores(params: Params, part: str, kept: Kept) -> Scores:
            ask, networks = self.ask, (kept[stage.vectors], kept[writer])
            ways = {"continuous": partial(ask.continuous, cfg, rolls.never)}
            ways["discretized"] = partial(ask.discretized, cfg, stage.vectors)
            found = {way: ask.rolled(roll, part, params, *networks) for way, roll in ways.items()}
            for name, stop in self.stops(stage).items() if part == "test" else ():  # no checkpoint is chosen by these
                roll = partial(ask.continuous, cfg, stop)
                found[f"continuous, {name}"] = ask.rolled(roll, part, params, *networks, stopped=True)
            return {f"{stage.name} {way}": scores for way, scores in found.items()}

        loss = make_latent_loss(
            predict, self.states, self.stats, weights=stage.weights, temperature=self.cfg.temperature,
            capacity=self.capacity(stage.num_steps),
        )  # fmt: skip
        settings = {
            "vectors": stage.vectors, "decoder": writer, "weights": stage.weights, "unit_scale": stage.unit_scale,
            "dropout": self.cfg.dropout, "temperature": self.cfg.temperature,
        }  # fmt: skip

        needs = tuple(dict.fromkeys(("cot", stage.vectors, writer)))
        return Way(
            stage.name, stage, settings, needs, spec, loss, initial, scores,
            frozen=lambda kept: _copy(kept[writer]), vectors={"vectors": stage.vectors},
        )  # fmt: skip

    def stops(self, stage: LatentStage) -> dict[str, rolls.Stop]:
        """The rules that end a continuous roll by themselves."""
        found: dict[str, rolls.Stop] = {"classifier": rolls.by_classifier} if stage.weights.get("stop") else {}
        if self.cfg.stop_cosine is not None:
            found["cosine"] = rolls.by_cosine(self.cfg.stop_cosine)
        return found

    def train(self, way: Way, kept: Kept) -> Params:
        """Trains a stage, or goes on with it, and gives the parameters of its best validation."""
        cfg, stage = self.cfg, way.stage
        rows, vectors = self.rows("train", skip=way.skip), {}
        done = latest_step(home(f"{cfg.run_dir}/{way.name}", cfg.bucket) / CHECKPOINTS)
        if done != stage.num_steps:  # there are batches to come
            vectors = {field: self.precomputed(name, kept[name], rows) for field, name in way.vectors.items()}
        run = self.configured(way, {name: fingerprint(kept[name]) for name in way.needs})
        train_parameters(
            run, way.spec, way.loss, mesh=self.mesh,
            data=make_batches(cfg.data, rows, self.task, num_steps=stage.num_steps, vectors=vectors),
            place=partial(shard_rows, mesh=self.mesh), initial=partial(way.initial, kept), frozen=way.frozen(kept),
            evaluate=partial(self.validate, way, kept),
            speed=Throughput(cfg.data.batch_size * rows.columns["text"].length), row_keys=True,
        )  # fmt: skip
        return way.whole(self.load(run, way.spec), kept)

    def configured(self, way: Way, starts_from: dict[str, str]) -> StageRun:
        """The stage as a run of its own. starts_from: fingerprints of the parameters of the stages before it."""
        cfg, stage = self.cfg, way.stage
        every = max(1, -(-stage.num_steps // cfg.evals))
        return StageRun(
            run_dir=str(Path(cfg.run_dir) / way.name), settings=way.settings, starts_from=starts_from, model=self.model,
            init_from=None if way.needs else cfg.init_from, data=cfg.data,
            train=TrainConfig(
                num_steps=stage.num_steps, log_every=20, eval_every=every, checkpoint_every=every,
                best_metric=f"validation/{way.best}", best_mode="max", seed=cfg.seed, bucket=cfg.bucket,
                sparse_core=cfg.sparse_core,
            ),
            optim=OptimConfig(
                learning_rate=stage.learning_rate, schedule="linear", warmup_steps=stage.warmup_steps,
                weight_decay=stage.weight_decay,
            ),
            profile=cfg.profile,
        )  # fmt: skip

    def validate(self, way: Way, kept: Kept, state: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        """`evaluate` of the loop: the scores on the validation samples."""
        if stop():
            return None
        found = way.judge(way.whole(averaged(state), kept), "validation", kept)
        inference = {row: "/".join(["validation", *row.removeprefix(way.name).split()]) for row in found}
        scores = {f"{inference[row]}/{k}": v for row, scores in found.items() for k, v in scores.items()}
        if len(found) > 1:  # one checkpoint serves all ways of inference
            scores["validation/accuracy"] = sum(row["accuracy"] for row in found.values()) / len(found)
        return scores

    def load(self, run: StageRun, spec: specs.Spec) -> Params:
        """The parameters of the best checkpoint, on the mesh."""
        shapes = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            specs.abstract(spec), param_shardings(spec, self.mesh),
        )  # fmt: skip
        folder = home(run.run_dir, run.train.bucket) / CHECKPOINTS
        return load_params(folder, shapes, step=best_step(folder, run.train.best_metric, run.train.best_mode))

    def rows(self, part: str, *, skip: int = 0) -> SentenceRows:
        """The rows of a part, without that many steps at the front of each sample; the answer stays."""
        if not skip:
            return self.task.rows[part]
        shorter = [dataclasses.replace(sample, steps=sample.steps[skip:]) for sample in self.task.samples[part]]
        return sample_rows(self.cfg.data, shorter, self.task.tokenizer, part)[0]

    def precomputed(self, name: str, params: Params, rows: SentenceRows) -> np.ndarray:
        """The vectors that a stage gives the sentences of all rows, [rows, M, D]: its parameters are frozen by now."""
        narrow, size = fitted(rows), self.cfg.data.batch_size
        hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
        found = map_rows(
            partial(self.ask.whole(self.vectors[name]), params), eval_batches(narrow, batch_size=size, **hosts),
            place=partial(shard_rows, mesh=self.mesh), total=-(-len(narrow.plan) // size), what=f"vectors of {name}",
        )  # fmt: skip
        return found[: len(narrow.plan)]

    def _capacity(self, num_steps: int) -> int:
        """The most sentences of a batch of a stage, up to the next that all devices share evenly."""
        batches = make_batches(self.cfg.data, self.task.rows["train"], self.task, num_steps=num_steps)
        share = 8 * batch_parts(self.mesh)
        return -(-most_sentences(batches, num_steps) // share) * share

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


def _copy(params: Params) -> Params:
    return jax.tree.map(lambda x: x + 0, params)  # the state of the next stage is donated, and these are kept
