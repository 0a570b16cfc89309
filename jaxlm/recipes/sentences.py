"""What the recipes that train an encoder of sentences wire alike: model, tokenizer, scores on the way, what is kept."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxlm.data.sentences import SentenceConfig, Sentences, sentence_tokenizer
from jaxlm.data.tokenizer import HFTokenizer
from jaxlm.evals import encoder_folder
from jaxlm.evals.encode import POOLERS, Encoder, Pooling
from jaxlm.losses.masking import mask_tokens
from jaxlm.models import masked_lm, pooling, sentence_encoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig, EncoderConfig
from jaxlm.models.sentence_encoder import AnyConfig
from jaxlm.recipes.describe import parameter_table
from jaxlm.recipes.shrink import fold_mesh, shrink_decoder, shrink_encoder, shrink_train
from jaxlm.recipes.wiring import averaged, say, train_parameters
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.sharding.place import check_batch, make_constrain, shard_rows
from jaxlm.sharding.rules import param_shardings
from jaxlm.train.bucket import CHECKPOINTS, home
from jaxlm.train.checkpoint import best_step, load_params
from jaxlm.train.config import TrainConfig
from jaxlm.train.contrastive import make_encode
from jaxlm.train.evaluate import Evaluate
from jaxlm.train.gradient_cache import EncodeFn
from jaxlm.train.loop import Result
from jaxlm.train.masked_lm import make_masked_lm_loss
from jaxlm.train.optim import OptimConfig
from jaxlm.train.profile import ProfileConfig
from jaxlm.train.progress import Throughput
from jaxlm.typing import Array, LossFn, Params

RESULTS = "results.json"


class SentenceRun(Protocol):
    """The groups of a recipe's config that trains an encoder of sentences."""

    run_dir: str
    data: SentenceConfig
    train: TrainConfig
    optim: OptimConfig
    model: AnyConfig | None
    init_from: str | None
    mesh: MeshConfig
    profile: ProfileConfig
    dropout: float
    scan_layers: bool
    pooling: Pooling


def resolve(cfg: Any) -> Any:
    """Fills in the model and the tokenizer from `init_from`; ValueError if there is neither."""
    if cfg.init_from is None and (cfg.model is None or cfg.data.tokenizer is None):
        raise ValueError(
            "config: give init_from (a Hugging Face folder), or model (its fields) and data.tokenizer (bpe:8000, say)"
        )
    model = cfg.model or sentence_encoder.load_config(cfg.init_from)
    data = dataclasses.replace(cfg.data, tokenizer=cfg.data.tokenizer or cfg.init_from)
    if cfg.model is not None and cfg.model.dropout not in (0.0, cfg.dropout):
        raise ValueError(f"model.dropout={cfg.model.dropout} beside dropout={cfg.dropout}: set dropout alone")
    model = dataclasses.replace(model, dropout=cfg.dropout, scan_layers=cfg.scan_layers)
    return dataclasses.replace(cfg, model=model, data=data)


def shrink(cfg: Any) -> Any:
    """The same run with a small random encoder, two rows a device, short texts and few steps, on a folded mesh."""
    mesh, train = fold_mesh(cfg.mesh), shrink_train(cfg.train)
    rows = 2 * mesh.slice * (mesh.data or 1) * mesh.fsdp
    model = shrink_decoder(cfg.model) if isinstance(cfg.model, DecoderConfig) else shrink_encoder(cfg.model)
    return dataclasses.replace(
        cfg, run_dir=f"{cfg.run_dir}-shrunk", init_from=None, model=model, train=train, mesh=mesh, chunk_size=None,
        data=dataclasses.replace(cfg.data, batch_size=rows, max_tokens=min(cfg.data.max_tokens, 16)),
        optim=dataclasses.replace(cfg.optim, warmup_steps=min(cfg.optim.warmup_steps, 1)),
    )  # fmt: skip


def check(cfg: SentenceRun) -> None:
    """Raises ValueError for settings that would mean something else here."""
    if cfg.train.num_microbatches != 1:
        raise ValueError(
            f"train.num_microbatches={cfg.train.num_microbatches} would leave each part its own negatives only: leave "
            "it 1, and save memory by chunk_size, which changes no number"
        )
    if cfg.mesh.sequence != 1:
        raise ValueError(f"mesh.sequence={cfg.mesh.sequence}: sentences are short and not split; leave it 1")
    if cfg.train.z_loss:
        raise ValueError(f"train.z_loss is of the recipe lm, found {cfg.train.z_loss}: leave it 0")
    if cfg.model is None:
        return
    sentence_encoder.check_pooling(cfg.model, cfg.pooling)
    if cfg.data.longest > cfg.model.max_length:
        raise ValueError(
            f"data: texts of {cfg.data.longest} tokens, but the model ends at max_length={cfg.model.max_length}: "
            "shorten the one or lengthen the other"
        )


def tokenizer_of(cfg: SentenceRun, texts: Iterable[str]) -> HFTokenizer:
    """The tokenizer, trained on the texts if the config says so; ValueError if the model has too few rows for it."""
    assert cfg.model is not None and cfg.data.tokenizer is not None  # resolve
    tokenizer = sentence_tokenizer(cfg.data.tokenizer, texts)
    if tokenizer.vocab_size > cfg.model.vocab_size:
        raise ValueError(
            f"the tokenizer {cfg.data.tokenizer!r} has {tokenizer.vocab_size} ids and the model only "
            f"vocab_size={cfg.model.vocab_size}: set model.vocab_size to at least {tokenizer.vocab_size}"
        )
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A resolved config on its mesh: the encoder as the loss sees it, and the run around a loss.

    head: vectors in training are those behind the encoder's head. on: the mesh (None: of all devices that are here).
    """

    cfg: SentenceRun
    tokenizer: HFTokenizer
    head: bool = False
    on: jax.sharding.Mesh | None = None

    def __post_init__(self) -> None:
        check(self.cfg)
        check_batch(self.mesh, batch_size=self.cfg.data.batch_size, sequence_length=1)

    @property
    def model(self) -> AnyConfig:
        """The resolved model."""
        assert self.cfg.model is not None
        return self.cfg.model

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices."""
        return self.on or make_mesh(self.cfg.mesh)

    def forward(self, params: Params, tokens: Array, *, segments: Array, key: Any) -> Array:
        """Tokens to hidden states."""
        constrain = make_constrain(self.mesh)
        return sentence_encoder.forward(params, tokens, cfg=self.model, segments=segments, key=key, constrain=constrain)

    def encode(self) -> EncodeFn:
        """Tokens to vectors, under the head where the run trains one."""

        def pool(params: Params, hidden: Array, mask: Array) -> Array:
            pooled = POOLERS[self.cfg.pooling](hidden, mask)
            return pooling.head(params["head"], pooled) if self.head else pooled

        return make_encode(self.forward, pool)

    def masked_lm(self, column: str, weight: float) -> LossFn:
        """The masked-LM loss on a column, to be added to a contrastive one."""
        tokenizer, cfg = self.tokenizer, self.model
        if tokenizer.mask_id is None or not isinstance(cfg, EncoderConfig) or cfg.masked_lm is None:
            lacking = "the tokenizer has no mask_token" if tokenizer.mask_id is None else "the model has no such head"
            raise ValueError(f"masked_lm_weight={weight}: {lacking}; set it to 0")

        def states(params: Params, tokens: Array, *, segments: Array, key: Any) -> Array:
            return masked_lm.transform(params, self.forward(params, tokens, segments=segments, key=key), cfg=cfg)

        mask = partial(
            mask_tokens, mask_id=tokenizer.mask_id, vocab_size=tokenizer.vocab_size, special_ids=tokenizer.special_ids
        )
        loss = make_masked_lm_loss(states, partial(masked_lm.head, cfg=cfg), mask, scale=weight)
        fields = ("tokens", "segments")
        return lambda params, batch, key: loss(params, {name: batch[f"{column}/{name}"] for name in fields}, key)

    def encoder(self, params: Params) -> Encoder:
        """The encoder as its users will have it, with these parameters on the mesh."""
        return Encoder(
            self.model, params, self.tokenizer, self.cfg.pooling, unit=True, max_tokens=self.limit, mesh=self.mesh
        )

    @cached_property
    def limit(self) -> int:
        """Where the encoder cuts texts: where that of init_from does, or beyond the longest that it was trained on."""
        if self.cfg.init_from is None:
            return self.cfg.data.longest
        return min(
            encoder_folder.read(Path(self.cfg.init_from)).max_tokens or self.model.max_length, self.model.max_length
        )

    def train(self, loss_fn: LossFn, columns: Sequence[str], data: Sentences, evaluate: Evaluate | None) -> Result:
        """Trains the encoder; started again on the same run folder, it resumes. columns: what the loss encodes."""
        cfg, spec = self.cfg, sentence_encoder.spec(self.model)
        say(parameter_table(spec, param_shardings(spec, self.mesh)))
        say_example(data, self.tokenizer)
        data.train.require(cfg.train.num_steps)

        return train_parameters(
            cfg,
            spec,
            loss_fn,
            mesh=self.mesh,
            data=data,
            place=partial(shard_rows, mesh=self.mesh),
            initial=lambda: None if cfg.init_from is None else sentence_encoder.load(cfg.init_from)[1],
            evaluate=evaluate,
            speed=Throughput(tokens_per_step(data, columns)),
            row_keys=True,  # masked words need them too; a model without dropout ignores them
        )

    def keep(self) -> Path:
        """Writes the encoder of the best checkpoint (the newest, without a best_metric) to run_dir/encoder."""
        train_cfg, folder = self.cfg.train, Path(self.cfg.run_dir)
        step, out = 0, folder / "encoder"
        if jax.process_index() == 0:
            step = best_step(self.checkpoints(), train_cfg.best_metric, train_cfg.best_mode)
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
        params = self.load(step)
        if jax.process_index() == 0:
            shutil.rmtree(out, ignore_errors=True)  # of the same run, when it was shorter
            dataclasses.replace(self.encoder(params), mesh=None).save(out)
            say(f"encoder of step {step}: {out}")
        return out

    def checkpoints(self) -> epath.Path:
        """The folder of the run's checkpoints."""
        return home(self.cfg.run_dir, self.cfg.train.bucket) / CHECKPOINTS

    def load(self, step: int) -> Params:
        """The parameters of a checkpoint (averaged, where the run averages them), whole on the first device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shapes = specs.abstract(sentence_encoder.spec(self.model))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
        ema = self.cfg.train.ema_decay is not None
        return load_params(self.checkpoints(), target, step=step, ema=ema)


def make_scores(trainer: Trainer, sets: dict[str, Callable[[Encoder], dict[str, float]]]) -> Evaluate:
    """`evaluate` of the loop: every set's scores of the encoder as it is, as `<set>/<score>`."""

    def evaluate(state: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        found = trainer.encoder(averaged(state))
        scores: dict[str, float] = {}
        for name, score in sets.items():
            if stop():
                return None
            scores |= {f"{name}/{metric}": value for metric, value in score(found).items()}
        return scores

    return evaluate


def tokens_per_step(data: Sentences, columns: Sequence[str]) -> int:
    """Tokens that the encoder reads for a global batch, padding included; a column that stands twice counts twice."""
    rows = data.train.sources[0]
    return data.train.batch_size * sum(rows.columns[name].length for name in columns)


def say_example(data: Sentences, tokenizer: HFTokenizer) -> None:
    """Says what is trained on: the first row of the first batch as text, and what was left out."""
    batch = data.train.batch(0)
    rows = data.train.sources[0]
    for name in rows.columns:
        ids = batch[f"{name}/tokens"][0][batch[f"{name}/segments"][0] != 0]
        say(f"{name}: {tokenizer.decode(ids)!r} ({len(ids)} tokens of {batch[f'{name}/tokens'].shape[1]})")
    for name in rows.extra:
        say(f"{name}: {np.array2string(batch[name][0], threshold=8)}")
    counts: collections.Counter[str] = data.skipped
    if counts:
        say("left out of the data: " + ", ".join(f"{n:,} {reason}" for reason, n in sorted(counts.items())))


def write_results(run_dir: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Writes results.json: the scores of each system, `trained` being the run's own; null for no number."""
    path = Path(run_dir) / RESULTS
    known = {row: {k: v if math.isfinite(v) else None for k, v in scores.items()} for row, scores in rows.items()}
    path.with_suffix(".part").write_text(json.dumps(known, indent=1) + "\n")
    path.with_suffix(".part").replace(path)
