"""SimCSE end to end on tiny data: it learns, resumes to the bit, keeps an encoder, and sweeps make a table."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.data.sentences import SentenceConfig
from jaxlm.data.sources import SourceConfig
from jaxlm.evals.encode import Encoder
from jaxlm.models.config import DecoderConfig, EncoderConfig, MaskedLMConfig
from jaxlm.recipes import sentences, simcse, sweep
from jaxlm.recipes.config import to_dataclass, to_dict
from jaxlm.sharding.mesh import MeshConfig, make_mesh
from jaxlm.train.config import TrainConfig
from jaxlm.train.optim import OptimConfig

NOUNS, VERBS = ("cat", "dog", "bird", "child", "farmer", "king"), ("sleeps", "runs", "sings", "eats", "reads")
SENTENCES = [f"The {noun} {verb} {where}." for noun in NOUNS for verb in VERBS for where in ("here", "at home")]
MODEL = EncoderConfig(vocab_size=320, width=32, num_layers=1, num_heads=2, mlp_width=64, max_length=16)
GUESSER = dataclasses.replace(MODEL, masked_lm=MaskedLMConfig())
DECODER = DecoderConfig(
    vocab_size=320, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=64, max_length=16,
    tie_embeddings=False,  # as Llama 3; an encoder of sentences has no unembedding either way
)  # fmt: skip
TRAIN = TrainConfig(
    num_steps=8, eval_every=4, checkpoint_every=4, log_every=4, best_metric="dev/uniformity", best_mode="min"
)


@pytest.fixture(scope="module")
def dev(tmp_path_factory) -> str:
    """Pairs of sentences scored by the words that they share; the first two sentences are nowhere else."""
    path = tmp_path_factory.mktemp("dev") / "dev.csv"
    texts = SENTENCES[::7]
    rows = [(a, b, 5 * len(set(a.split()) & set(b.split())) / 3) for a in texts for b in texts if a < b]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def config(folder: Path, dev: str | None, **changes) -> simcse.Config:
    data = SentenceConfig(
        train=(SourceConfig("memory", rows=tuple({"text": t} for t in SENTENCES), name="toy"),),
        tokenizer="bpe:320", max_tokens=16, batch_size=8, epochs=9, num_threads=0,
    )  # fmt: skip
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0)
    train = TRAIN if dev is not None else dataclasses.replace(TRAIN, best_metric=None)
    plain = dict(run_dir=str(folder), data=data, train=train, optim=optim, model=MODEL, dev=dev)
    return simcse.Config(**plain | changes)


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, dev) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    simcse.run(config(folder, dev))
    return folder


def test_a_run_spreads_the_vectors_and_leaves_an_encoder_and_its_scores(whole):
    points = [line for line in lines(whole) if "dev/uniformity" in line]
    assert [p["step"] for p in points] == [0, 4, 8]
    assert points[-1]["dev/uniformity"] < points[0]["dev/uniformity"] - 0.5
    assert {line["data/of an evaluation"] for line in lines(whole) if "train/loss" in line} == {len(SENTENCES[::7])}
    results = json.loads((whole / "results.json").read_text())
    assert set(results) == {"trained", "start", "TF-IDF words", "TF-IDF characters"}
    best = min(points, key=lambda p: p["dev/uniformity"])
    assert results["trained"]["dev/uniformity"] == pytest.approx(best["dev/uniformity"], abs=1e-4)
    vectors = Encoder.load(whole / "encoder").encode(SENTENCES[:2])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    exported = json.loads((whole / "encoder" / "config.json").read_text())
    assert exported["pad_token_id"] == Encoder.load(whole / "encoder").tokenizer.pad_id == 1
    assert (whole / "sphere.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_stopped_and_started_again_it_writes_the_same(whole, tmp_path, dev):
    short = TrainConfig(**{**to_dict(TRAIN), "num_steps": 4})
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=1, weight_decay=0.0, schedule="constant")
    simcse.run(config(tmp_path / "twice", dev, train=short, optim=optim))
    simcse.run(config(tmp_path / "twice", dev, optim=optim))
    simcse.run(config(tmp_path / "once", dev, optim=optim))
    once, twice = (
        [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines(tmp_path / name)]
        for name in ("once", "twice")
    )
    assert once == twice


VARIANTS = {
    "triples": dict(fields=("a", "b", "c"), examples="tuples"),
    "scored": dict(fields=("a", "b"), examples="tuples", score_field="score"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "changes"),
    [
        ("triples", dict(hard_negative_weight=2.0, matryoshka=(8, 32), chunk_size=4)),
        ("scored", dict(loss="cosent")),
        ("scored", dict(loss="angle")),
        ("scored", dict(loss="cosine_mse")),
        (None, dict(masked_lm_weight=0.1, model=GUESSER)),
        (None, dict(one_mask=True, pooling="cls", train_head=True)),
    ],
)
def test_every_way_of_training_runs_and_its_loss_falls(tmp_path, data, changes):
    rows = tuple(
        dict(a=text, b=text.replace("The", "A"), c=SENTENCES[-i - 1], score=str(i % 6))
        for i, text in enumerate(SENTENCES[:30])
    )
    model = dataclasses.replace(MODEL, head="train_head" in changes)
    train = TrainConfig(num_steps=24, eval_every=None, checkpoint_every=None, log_every=4)
    made = config(tmp_path / "run", None).data
    if data is not None:
        made = dataclasses.replace(made, train=(SourceConfig("memory", rows=rows),), epochs=40, **VARIANTS[data])
    simcse.run(config(tmp_path / "run", None, **{"model": model} | changes, data=made, train=train))
    losses = [line["train/loss"] for line in lines(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert Encoder.load(tmp_path / "run" / "encoder").encode(["A text."]).shape == (1, 32)


@pytest.mark.slow
def test_contrast_starts_from_an_encoder_that_has_learnt_to_guess_words(tmp_path, dev):
    learn = TrainConfig(num_steps=40, eval_every=None, checkpoint_every=None, log_every=4)
    optim = OptimConfig(learning_rate=1e-2, warmup_steps=4, weight_decay=0.0)
    simcse.run(config(tmp_path / "words", None, loss="masked_lm", model=GUESSER, train=learn, optim=optim))
    losses = [line["train/masked_lm"] for line in lines(tmp_path / "words") if "train/masked_lm" in line]
    assert losses[-1] < 0.7 * losses[0]
    start = config(tmp_path / "run", dev, init_from=str(tmp_path / "words" / "encoder"), model=None)
    simcse.run(dataclasses.replace(start, data=dataclasses.replace(start.data, tokenizer=None)))
    vectors = Encoder.load(tmp_path / "words" / "encoder").encode(SENTENCES)
    uniform = np.log(np.mean(np.exp(-2 * (2 - 2 * (vectors @ vectors.T)[np.triu_indices(len(vectors), 1)]))))
    assert lines(tmp_path / "run")[-1]["dev/uniformity"] < uniform - 0.2


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(whole, tmp_path, dev):
    simcse.run(config(tmp_path / "run", dev, mesh=MeshConfig(data=4, fsdp=2)))
    for a, b in zip(lines(whole), lines(tmp_path / "run"), strict=True):
        for name in ("train/loss", "dev/uniformity", "dev/spearman"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3)


def test_a_decoder_stays_one_in_the_record_and_when_shrunk(tmp_path):
    cfg = simcse.resolve(config(tmp_path, None, model=DECODER, pooling="last"))
    assert to_dataclass(simcse.Config, to_dict(cfg)) == cfg
    small = simcse.shrink(cfg).model
    assert isinstance(small, DecoderConfig) and small.num_heads == 4 and small.num_kv_heads == 2


@pytest.mark.slow
def test_a_decoder_learns_and_goes_on_from_what_it_left(tmp_path):
    train = TrainConfig(num_steps=12, eval_every=None, checkpoint_every=None, log_every=4)
    simcse.run(config(tmp_path / "run", None, model=DECODER, pooling="last", train=train))
    losses = [line["train/loss"] for line in lines(tmp_path / "run") if "train/loss" in line]
    assert losses[-1] < losses[0] - 0.5
    kept = Encoder.load(tmp_path / "run" / "encoder")
    assert kept.pooling == "last" and isinstance(kept.cfg, DecoderConfig)
    # On from its folder; a step of size 0 leaves it as it is.
    again = config(tmp_path / "again", None, model=None, init_from=str(tmp_path / "run" / "encoder"), pooling="last")
    again = dataclasses.replace(
        again, data=dataclasses.replace(again.data, tokenizer=None), train=dataclasses.replace(train, num_steps=1),
        optim=OptimConfig(learning_rate=0.0, warmup_steps=0, weight_decay=0.0),
    )  # fmt: skip
    simcse.run(again)
    gone_on = Encoder.load(tmp_path / "again" / "encoder")
    np.testing.assert_array_equal(gone_on.encode(SENTENCES), kept.encode(SENTENCES))


@pytest.mark.slow
def test_a_decoder_has_the_same_numbers_on_eight_devices(tmp_path, dev, monkeypatch):
    simcse.run(
        config(tmp_path / "eight", dev, model=DECODER, pooling="last", mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    )
    monkeypatch.setattr(sentences, "make_mesh", partial(make_mesh, devices=jax.devices()[:1]))
    simcse.run(config(tmp_path / "one", dev, model=DECODER, pooling="last"))
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "eight"), strict=True):
        for name in ("train/loss", "train/grad_norm", "dev/uniformity", "dev/spearman"):
            assert (name in a) == (name in b)
            if name in a:
                assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-3)
    first, second = (Encoder.load(tmp_path / name / "encoder").encode(SENTENCES) for name in ("one", "eight"))
    np.testing.assert_allclose(first, second, atol=2e-3)


@pytest.mark.slow
def test_a_sweep_runs_what_is_missing_and_makes_a_table(tmp_path, dev, capsys):
    base = to_dict(config(tmp_path / "unused", dev))
    base["train"]["num_steps"] = 4
    cfg = sweep.Config(
        run_dir=str(tmp_path / "sweep"), base=base, seeds=(0, 1), metrics=("dev/spearman", "dev/uniformity"),
        rows=("TF-IDF words",), variants=(sweep.Variant("Plain"), sweep.Variant("tau 1", ("temperature=1.0",))),
    )  # fmt: skip
    found = sweep.run(cfg)
    assert {name: len(results) for name, results in found.items()} == {"Plain": 2, "tau 1": 2}
    assert found["Plain"][0] != found["Plain"][1] and found["Plain"][0] != found["tau 1"][0]
    text = (tmp_path / "sweep" / "table.md").read_text()
    assert "| TF-IDF words | " in text and " ± " in text
    capsys.readouterr()
    assert sweep.run(cfg) == found and "===" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"temperature: 0.05 -> 0.1"):
        sweep.run(dataclasses.replace(cfg, base=base | {"temperature": 0.1}))
    with pytest.raises(ValueError, match="variants that its folders tell apart"):
        dataclasses.replace(cfg, variants=(sweep.Variant("Tau 1"), sweep.Variant("tau=1")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="cosent"), "loss='cosent' with data.score_field=None: expected simcse"),
        (dict(train=TRAIN), "needs an evaluation"),
        (dict(masked_lm_weight=0.1, chunk_size=4), "leave chunk_size out"),
        (dict(train_head=True), "model.head=True"),
        (dict(masked_lm_weight=0.1), "masked words need parameters"),
        (dict(loss="masked_lm"), "masked words need parameters"),
        (dict(loss="masked_lm", model=GUESSER, chunk_size=4), "trains no sentence vector: leave out chunk_size"),
        (dict(model=DECODER, masked_lm_weight=0.1), "of encoders, the model is a decoder: leave them out"),
        (dict(model=DECODER, pooling="cls"), "pooling='cls' takes the first token's state, and in a causal model"),
        (dict(model=dataclasses.replace(MODEL, max_length=8)), "texts of 16 tokens, but the model ends at"),
        (dict(train=TrainConfig(num_steps=2, num_microbatches=2)), "would leave each part its own negatives"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, None, **changes)


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(ValueError, match="set model.vocab_size to at least"):
        simcse.run(config(tmp_path, None, model=dataclasses.replace(MODEL, vocab_size=100)))
    with pytest.raises(ValueError, match="give init_from"):
        simcse.resolve(config(tmp_path, None, model=None))
