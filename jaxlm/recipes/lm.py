"""Language modelling: next-token pretraining, and supervised fine-tuning (the same loss under a completion mask).

`run` is the whole of it, top to bottom: tokenizer, data, model, mesh, objective, loop, report.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import jax
from jax.sharding import Mesh

from jaxlm.data import pipeline
from jaxlm.data.config import DataConfig
from jaxlm.data.sources import describe
from jaxlm.evals.compression import compressed_bpb
from jaxlm.generate.sample import SamplingConfig
from jaxlm.models import decoder
from jaxlm.models.config import DecoderConfig
from jaxlm.recipes.wiring import (
    averaged,
    heldout_batches,
    initial_params,
    make_apply,
    resolve,
    say,
    say_continuations,
    set_up,
    show_start,
    throughput,
    train_parameters,
)
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.sharding.place import make_constrain
from jaxlm.train.config import TrainConfig
from jaxlm.train.evaluate import make_evaluate
from jaxlm.train.loop import Result
from jaxlm.train.objectives import make_hidden_nll, make_next_token_loss
from jaxlm.train.optim import OptimConfig
from jaxlm.train.plot import plot_run
from jaxlm.train.profile import ProfileConfig
from jaxlm.train.step import make_eval_step
from jaxlm.typing import LossFn


@dataclasses.dataclass(frozen=True)
class Config:
    """A language-model run. What the groups hold is documented where they are defined.

    model: the decoder, or None with init_from, a Hugging Face or run folder whose parameters (and config) the run
    starts from. baselines: compressors whose bits per byte on the held-out text are printed and plotted beside the
    model's. sample_prompts: continued at the end by `sampling`.
    """

    run_dir: str
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    model: DecoderConfig | None = None
    init_from: str | None = None
    mesh: MeshConfig = MeshConfig()
    profile: ProfileConfig = ProfileConfig()
    recipe: Literal["lm"] = "lm"
    baselines: tuple[Literal["zlib", "bz2", "lzma"], ...] = ()
    sample_prompts: tuple[str, ...] = ()
    sampling: SamplingConfig = SamplingConfig()


def run(cfg: Config) -> Result:
    """Trains, evaluates, and reports; started again on the same run folder, it resumes."""
    cfg = resolve(cfg)
    s = set_up(cfg)
    spec = decoder.spec(s.model)
    show_start(spec, s)
    loss_fn = make_loss(cfg, s.model, s.mesh)
    heldout = heldout_batches(cfg.data, s.data)
    result = train_parameters(
        cfg,
        spec,
        loss_fn,
        mesh=s.mesh,
        data=s.data,
        place=s.place,
        speed=throughput(cfg.data, s.model, spec, s.mesh),
        row_keys=s.model.dropout > 0,
        initial=partial(initial_params, cfg.init_from),
        evaluate=make_evaluate(make_eval_step(loss_fn), heldout, place=s.place, params_of=averaged)
        if heldout
        else None,
    )
    if jax.process_index() == 0:
        _report(cfg, result)
    say_continuations(cfg.sample_prompts, cfg.sampling, averaged(result.state), s)
    return result


def make_loss(cfg: Config, model: DecoderConfig, mesh: Mesh) -> LossFn:
    """Next-token prediction by the model on the mesh."""
    apply = make_apply(model, make_constrain(mesh))
    return make_next_token_loss(
        make_hidden_nll(apply, partial(decoder.head, cfg=model), mesh=mesh), z_loss=cfg.train.z_loss
    )


def _report(cfg: Config, result: Result) -> None:
    """The model's held-out bits per byte beside the compressors', and the loss curve."""
    lines: dict[str, float] = {}
    for source in cfg.data.heldout:
        name = describe(source)
        bpb = result.metrics.get(f"{name}/bits_per_byte")
        if bpb is None:
            continue
        lines = {m: compressed_bpb(pipeline.texts(source), method=m) for m in cfg.baselines}
        others = "".join(f", {method} {value:.3f}" for method, value in lines.items())
        say(f"{name}: {bpb:.3f} bits per byte{others}")
    plot = plot_run(Path(cfg.run_dir) / "metrics.jsonl", Path(cfg.run_dir) / "loss.png", baselines=lines)
    say(f"loss curve: {plot}")
