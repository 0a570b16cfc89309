"""The recipe of sentence-by-sentence reasoning: stages that go on where they stopped, and how answers are judged."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlm.data.errors import BadRow
from jaxlm.data.sources import SourceConfig
from jaxlm.models import decoder
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig
from jaxlm.models.lora import LoraConfig
from jaxlm.recipes import sentence_by_sentence as recipe
from jaxlm.recipes import sentence_data
from jaxlm.recipes.config import to_dataclass, to_dict
from jaxlm.recipes.sentence_by_sentence import Curriculum, LatentStage, StageConfig
from jaxlm.recipes.sentence_data import TaskConfig
from jaxlm.recipes.sentence_lora import adapted
from jaxlm.recipes.sentence_stages import Stages
from jaxlm.recipes.sentence_table import costs, plot_costs
from jaxlm.sharding.mesh import MeshConfig
from jaxlm.train.metrics import read_lines

MODEL = DecoderConfig(
    vocab_size=320, width=32, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64, max_length=256,
    scan_layers=False,
)  # fmt: skip
TASK = TaskConfig(
    "blocksworld", "sentencepiece:300", num_blocks=3, num_validation=8, num_test=8, max_steps=6, max_step_tokens=20,
    max_question_tokens=96, batch_size=8, num_threads=0,
)  # fmt: skip


def config(folder, **changes) -> recipe.Config:
    stages = {name: StageConfig(6, learning_rate=1e-2) for name in ("direct", "cot", "semantic", "contextual")}
    stages["contrastive"] = StageConfig(3)
    hybrid = LatentStage(3, name="hybrid", weights={"nll": 1.0}, vectors="semantic", decoder="contextual")
    curricula = (Curriculum(3, num_stages=2), Curriculum(3, name="pause", kind="pause", num_stages=1))
    plain = dict(
        run_dir=str(folder), data=TASK, stages=stages, latents=(LatentStage(6, name="ours"), hybrid), model=MODEL,
        mesh=MeshConfig(), num_sentences=3, evals=2, curricula=curricula, stop_cosine=0.9,
    )  # fmt: skip
    return recipe.Config(**plain | changes)


WAYS = ("continuous", "discretized")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return sentence_data.make_task(TASK, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def on_one_device(monkeypatch):
    """Programs of one device compile faster, and can be kept on disk; a mesh has a test of its own."""
    monkeypatch.setattr("jaxlm.recipes.sentence_stages.make_mesh", lambda cfg: _one_device_mesh())


@pytest.fixture
def compiled_once(tmp_path, on_one_device):
    """Programs are kept on disk: a recipe that is run again in this process does not compile them anew."""
    changed = {
        "jax_compilation_cache_dir": str(tmp_path / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
    }
    before = {name: getattr(jax.config, name) for name in changed}
    for values in (changed, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is changed:
            yield


@pytest.mark.slow
def test_all_stages_run_and_started_again_they_go_on(tmp_path, monkeypatch, compiled_once):
    rows = recipe.run(config(tmp_path / "run"))
    ours = [f"ours {how}" for how in (*WAYS, "continuous, classifier", "continuous, cosine")]
    hybrid = [f"hybrid {how}" for how in (*WAYS, "continuous, cosine")]
    ways = [*ours, *hybrid, "coconut", "pause"]
    assert list(rows) == ["direct", "cot", "semantic", "contextual", "contrastive", *ways]
    assert all(1 <= rows[way]["sentences"] <= 3 for way in ways if "," in way)
    assert (tmp_path / "run" / "flops.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == rows
    losses = [json.loads(line) for line in (tmp_path / "run" / "cot" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] == 6
    # Another latent is added: the stages before it are there already, and give the same scores.
    more = (*config(tmp_path).latents, LatentStage(3, name="more", unit_scale=True))
    before = (tmp_path / "run" / "cot" / "metrics.jsonl").read_text()
    again = recipe.run(config(tmp_path / "run", latents=more))
    assert {name: again[name] for name in rows} == rows and "more continuous" in again
    assert (tmp_path / "run" / "cot" / "metrics.jsonl").read_text() == before
    # Nothing is taken for done that other settings, or another stage before it, would change.
    with pytest.raises(ValueError, match=r"settings.dropout: 0.2 -> 0.1"):
        recipe.run(config(tmp_path / "run", latents=more, dropout=0.1))
    monkeypatch.setattr("jaxlm.recipes.sentence_stages.fingerprint", lambda params: "of other parameters")
    with pytest.raises(ValueError, match=r"starts_from.cot: .* -> of other parameters"):
        recipe.run(config(tmp_path / "run", latents=more))


@pytest.mark.slow
def test_eight_devices_give_the_losses_of_one(tmp_path, monkeypatch):
    def losses(folder, mesh):
        small = dict(stages={"cot": StageConfig(4), "contextual": StageConfig(4)}, latents=(LatentStage(4, name="z"),))
        small |= dict(curricula=(Curriculum(4, num_stages=1),), evals=1)
        recipe.run(config(folder, mesh=mesh, **small))
        lines = [line for name in ("z", "coconut-1") for line in read_lines(folder / name / "metrics.jsonl")]
        return [line["train/loss"] for line in lines if "train/loss" in line]

    many = losses(tmp_path / "many", MeshConfig(data=2, fsdp=4))
    monkeypatch.setattr("jaxlm.recipes.sentence_stages.make_mesh", lambda cfg: _one_device_mesh())
    np.testing.assert_allclose(many, losses(tmp_path / "one", MeshConfig()), rtol=1e-4)


@pytest.mark.slow
def test_adapters_are_trained_where_the_model_is_frozen(tmp_path, compiled_once):
    small = dict(stages={"cot": StageConfig(4), "contextual": StageConfig(4)}, latents=(LatentStage(4, name="z"),))
    cfg = config(tmp_path / "run", **small, curricula=(), lora=LoraConfig(rank=2, targets=("q", "out")))
    rows = recipe.run(cfg)
    assert list(rows)[:2] == ["cot", "contextual"] and "z continuous" in rows
    held = {n: next((tmp_path / "run" / n).rglob("params/_METADATA")).read_text() for n in ("cot", "contextual", "z")}
    assert "'table'" in held["cot"] and "lora_a" not in held["cot"]
    for name in ("contextual", "z"):
        assert "lora_a" in held[name] and "'table'" not in held[name] and "'gate'" not in held[name]
    assert "'into'" in held["z"]
    assert recipe.run(cfg) == rows


@pytest.mark.slow
def test_a_stage_with_adapters_of_zeros_is_the_stage(task, tmp_path):
    cfg = config(tmp_path, dropout=0.0)
    stages = Stages(cfg, task)
    spec = decoder.spec(MODEL)
    kept = {name: specs.init(jax.random.key(i), spec) for i, name in enumerate(("cot", "contextual"))}
    batch = next(
        sentence_data.make_batches(TASK, task.rows["train"], task, num_steps=1).train.batches(0, 1, num_threads=0)
    )[1]
    way = stages.latent(cfg.latents[0])
    batch["vectors"] = np.asarray(stages.vectors["contextual"](kept["contextual"], batch))
    lora = LoraConfig(rank=2)
    other = adapted(way, lora, seed=0)
    start, frozen = other.initial(kept), other.frozen(kept)
    whole, adapters = (
        jax.jit(lambda params, kept, loss=x.loss: loss(params, batch, None, frozen=kept)[0]) for x in (way, other)
    )
    plain = whole(way.initial(kept), way.frozen(kept))
    assert float(adapters(start, frozen)) == pytest.approx(float(plain), rel=1e-6)
    moved = jax.tree.map(lambda x: x + 0.05, start)
    merged = whole(other.whole(moved, kept), way.frozen(kept))
    assert float(adapters(moved, frozen)) == pytest.approx(float(merged), rel=1e-5)
    assert float(merged) != pytest.approx(float(plain), rel=1e-3)


def _one_device_mesh():
    from jaxlm.sharding.mesh import make_mesh

    return make_mesh(MeshConfig(), jax.devices()[:1])


def test_answers_are_judged_and_steps_checked(task):
    samples = task.samples["test"]
    gold = [list(s.sentences) for s in samples]
    assert sentence_data.judge(task, samples, gold) == {"accuracy": 100.0, "solved": 100.0}
    no_steps = [[s.sentences[-1], "more"] for s in samples]
    assert sentence_data.judge(task, samples, no_steps) == {"accuracy": 100.0, "solved": 0.0}
    no_answer = [list(s.steps) for s in samples]
    assert sentence_data.judge(task, samples, no_answer) == {"accuracy": 0.0, "solved": 0.0}
    half = gold[:4] + [["### 99"]] * 4
    assert sentence_data.judge(task, samples, half) == {"accuracy": 50.0, "solved": 50.0}


def test_a_task_has_its_parts_and_one_tokenizer(task):
    assert {part: len(s) for part, s in task.samples.items()} == {"train": 140, "validation": 8, "test": 8}
    decode = task.tokenizer.decode
    row = task.rows["test"].row(0)
    sample = task.samples["test"][0]
    assert decode(row["text/tokens"][row["text/segments"] == 1]) == "\n".join([sample.question, *sample.sentences, ""])


def test_batches_are_no_wider_than_their_longest_row(task):
    rows = task.rows["train"]
    fitted = sentence_data.fitted(rows)
    segments, whole = fitted.extra["step_segments"], rows.extra["step_segments"]
    assert segments.shape[1] < whole.shape[1] and segments.shape[2] < whole.shape[2]
    assert segments.sum() == whole.sum() and segments[..., -1].any() and segments[:, -1].any()
    assert fitted.extra["ends"].shape[1] == segments.shape[1] + 1
    np.testing.assert_array_equal(fitted.extra["ends"].max(axis=1), rows.extra["ends"].max(axis=1))


@pytest.mark.slow
def test_vectors_of_a_frozen_stage_are_those_of_every_batch(task, tmp_path):
    stages = Stages(config(tmp_path), task)
    params, rows = specs.init(jax.random.key(0), decoder.spec(MODEL)), task.rows["train"]
    for name in ("semantic", "contextual"):
        found = stages.precomputed(name, params, rows)  # 140 rows: the last batch is not full
        batches = sentence_data.make_batches(TASK, rows, task, num_steps=3, vectors={"vectors": found})
        batch = batches.train.batch(2)
        np.testing.assert_allclose(batch["vectors"], stages.vectors[name](params, batch), atol=1e-5)
        assert batches.fingerprint == sentence_data.make_batches(TASK, rows, task, num_steps=3).fingerprint
    most = max(int((batches.train.batch(i)["step_segments"][..., 0] != 0).sum()) for i in range(3))
    assert sentence_data.most_sentences(batches, 3) == most <= stages.capacity(3)


def test_ones_own_samples_are_read(tmp_path):
    rows = [{"question": f"q{i}", "steps": ["a", "b" * (1 + 40 * (i == 3))], "answer": str(i)} for i in range(6)]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig("jsonl", path=str(path))
    cfg = dataclasses.replace(TASK, task="jsonl", tokenizer="bytes", train=source, validation=source, test=source)
    task = sentence_data.make_task(cfg, tmp_path / "tokenizer")
    assert [s.question for s in task.samples["test"]] == ["q0", "q1", "q2", "q4", "q5"] and task.solved is None
    assert task.skipped == {f"too long in {part}": 1 for part in ("train", "validation", "test")}
    assert sentence_data.judge(task, task.samples["test"], [["### 0"]] * 5) == {"accuracy": 20.0}
    with path.open("a") as file:
        file.write('{"question": "q"}\n')
    with pytest.raises(BadRow, match=r"mine.jsonl:7: missing field.*data.bad_rows='skip'"):
        sentence_data.make_task(cfg, tmp_path / "tokenizer")
    skipping = sentence_data.make_task(dataclasses.replace(cfg, bad_rows="skip"), tmp_path / "tokenizer")
    assert skipping.skipped["missing field"] == 3 and skipping.samples == task.samples


def test_settings_survive_the_record_and_what_cannot_be_meant_is_refused(tmp_path):
    cfg = config(tmp_path)
    assert to_dataclass(recipe.Config, to_dict(cfg)) == cfg
    small = recipe.shrink(cfg)
    assert small.run_dir.endswith("-shrunk") and {s.num_steps for s in small.stages.values()} == {2}
    for changes, message in [
        (dict(stages={"cott": StageConfig(1)}), "expected some of direct, cot"),
        (dict(stages={"semantic": StageConfig(1)}, latents=()), "semantic starts from .* add stages.cot"),
        (dict(latents=(LatentStage(1, name="cot"),)), "expected names of their own"),
        (dict(latents=(LatentStage(1, name="a b"),)), "expected names of their own"),
        (dict(latents=(LatentStage(1, name="coconut-2"),)), "expected names of their own"),
        (
            dict(
                latents=(LatentStage(1, decoder="contrastive"),),
                stages={n: StageConfig(1) for n in ("cot", "contextual")},
            ),
            "latent starts from .* add stages.contrastive",
        ),
        (dict(model=None), "give model"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipe.resolve(config(tmp_path, **changes))
    with pytest.raises(ValueError, match="expected train, validation and test; found none"):
        dataclasses.replace(TASK, task="gsm8k")
    with pytest.raises(ValueError, match="expected 'sentencepiece:SIZE'"):
        sentence_data.make_task(dataclasses.replace(TASK, tokenizer="sentencepiece:x"), tmp_path)
    with pytest.raises(ValueError, match="set model.vocab_size to at least 300"):
        recipe.run(config(tmp_path, model=dataclasses.replace(MODEL, vocab_size=260)))


def test_costs_are_those_of_the_test_samples(tmp_path, task):
    names = ["direct", "cot", "contextual", "ours continuous", "ours discretized", "hybrid discretized", "coconut"]
    rows: dict[str, dict[str, float]] = {name: {} for name in names} | {
        "ours continuous, classifier": {"sentences": 1.0}
    }
    found = costs(config(tmp_path), task, rows)
    assert found["contextual"] == {}
    last = {row: cost["MFLOP, head last"] for row, cost in found.items() if cost}
    order = ["direct", "coconut", "ours continuous", "cot", "hybrid discretized", "ours discretized"]
    assert sorted(order, key=last.get) == order
    assert last["direct"] < last["ours continuous, classifier"] < last["ours continuous"]
    head = 2 * MODEL.width * MODEL.vocab_size * np.mean([len(q) for q in task.rows["test"].columns["question"].tokens])
    for row, cost in found.items():
        if cost:
            assert cost["MFLOP, head every"] - last[row] == pytest.approx(head / 1e6)


def test_nothing_is_drawn_of_rows_without_costs(tmp_path):
    assert plot_costs({"contextual": {"accuracy": 50.0}}, tmp_path / "x.png") is None
    assert not (tmp_path / "x.png").exists()
