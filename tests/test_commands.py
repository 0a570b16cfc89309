"""The commands as a user runs them: train, resume, show, generate, convert, tokenizer, on real files and processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
TINY = [
    "--config.model.width=32", "--config.model.num_layers=2", "--config.model.num_heads=2",
    "--config.model.num_kv_heads=1", "--config.model.head_dim=16", "--config.model.mlp_width=64",
    "--config.data.sequence_length=64", "--config.data.batch_size=8", "--config.train.num_steps=6",
    "--config.train.log_every=2", "--config.train.eval_every=6", "--config.train.checkpoint_every=3",
    "--config.optim.warmup_steps=1", "--config.data.heldout.0.limit=2", "--config.data.train.0.limit=40",
    "--config.sampling.max_new_tokens=8", "--config.optim.name=adamw",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of the quickstart's config, tiny, through the command line."""
    folder = tmp_path_factory.mktemp("runs") / "quick"
    assert main(["train", "--config", str(ROOT / "configs/quickstart.py"), f"--config.run_dir={folder}", *TINY]) == 0
    return folder


def lines(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_everything_in_its_folder(run_dir):
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config"]["model"]["width"] == 32
    assert record["versions"]["jax"] and record["data_fingerprint"] and "6 x parameters" in record["flop_definition"]
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(run_dir.glob("tensorboard/events*"))
    last = {name: value for line in lines(run_dir) for name, value in line.items()}
    assert last["step"] == 6
    assert 0 < last["heldout/bits_per_byte"] < 8.5 and last["perf/tokens_per_s"] > 0


def test_a_finished_run_says_so_and_a_longer_one_resumes(run_dir, capsys):
    command = ["train", "--config", str(ROOT / "configs/quickstart.py"), f"--config.run_dir={run_dir}", *TINY]
    assert main(command) == 0
    first = capsys.readouterr()
    assert "step 6" in first.out + first.err
    assert main([*command, "--config.train.num_steps=8"]) == 0
    assert "resum" in (second := capsys.readouterr()).out.lower() + second.err.lower()
    assert max(line["step"] for line in lines(run_dir)) == 8
    assert main([*command, "--config.train.num_steps=8", "--config.optim.learning_rate=0.5"]) == 1
    assert "optim.learning_rate: 0.008 -> 0.5" in capsys.readouterr().err


def test_generate_streams_and_writes(run_dir, tmp_path, capsys):
    assert main(["generate", str(run_dir), "--prompt", "def f", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("def f")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "bc"}\n')
    out = tmp_path / "s.jsonl"
    many = ["generate", str(run_dir), "--prompts", str(tmp_path / "p.jsonl"), "--out", str(out), "--num-samples", "3"]
    assert main([*many, "--max-new-tokens", "4"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["prompt"] for r in rows] == ["a"] * 3 + ["bc"] * 3
    assert all(len(r["tokens"]) == len(r["logprobs"]) == len(r["entropies"]) <= 4 for r in rows)
    (tmp_path / "p.jsonl").write_text('{"prompt": 3}\n')
    assert main(many) == 1
    assert "p.jsonl:1: expected" in capsys.readouterr().err


def test_convert_writes_a_folder_that_generates_the_same(run_dir, tmp_path, capsys):
    assert main(["convert", str(run_dir), str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "config.json").is_file()
    capsys.readouterr()
    texts = []
    for model in (run_dir, tmp_path / "hf"):
        assert main(["generate", str(model), "--prompt", "import", "--max-new-tokens", "8", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert main(["convert", str(run_dir), str(tmp_path / "hf")]) == 1
    assert "exists: choose a new folder" in capsys.readouterr().err


def test_show_prints_what_training_sees(capsys):
    config = str(ROOT / "configs/quickstart.py")
    assert main(["show", "--config", config, "--rows", "1", "--config.data.sequence_length=32"]) == 0
    out = capsys.readouterr().out
    assert "row 0 is train row" in out and "⟦" in out
    assert main(["show", "--config", config, "--tokens", "--limit", "5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 6
    assert main(["show", "--config", str(ROOT / "configs/simcse/unsup.py")]) == 1
    assert "the recipe 'simcse' shows an example when it starts" in capsys.readouterr().err


def test_tokenizer_trains_a_lossless_model(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    for i in range(200):
        (tmp_path / "t" / f"{i}.txt").write_text(f"def f{i}(x):\n\treturn  x + {i}\n" * 5 + "naïve 漢字\n")
    assert (
        main(["tokenizer", "--text", str(tmp_path / "t"), "--vocab-size", "310", "--out", str(tmp_path / "tok")]) == 0
    )
    assert "310 pieces" in capsys.readouterr().out
    from jaxlm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tmp_path / "tok" / "tokenizer.model")
    for text in ("  two  spaces\n\n\ttab", "🙂 é 漢", " ", "line\r\nend ", "def f1(x):\n\treturn  x"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_teaches(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"jaxlm {command}" in capsys.readouterr().out


def test_bad_input_is_one_line_and_status_one(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "no.py")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert main(["train", "--config", str(ROOT / "configs/quickstart.py"), "--config.optim.learning_rte=1"]) == 1
    assert "did you mean learning_rate" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 1
    assert "neither a run's folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--debug"], ["--debug", "--no-jit"]], ids=" ".join)
def test_a_pods_config_shrinks_and_is_debugged_in_fresh_processes(tmp_path, extra):
    rows = [{"text": f"{i}: " + "all work and no play makes a dull corpus. " * 5} for i in range(2000)]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = f"{ROOT / 'configs/pretrain/llama_8b_pod.py'}:{tmp_path / 'few.jsonl'}"
    options = [
        f"--config.run_dir={tmp_path / 'r'}", f"--config.data.cache_dir={tmp_path / 'c'}",
        "--config.data.tokenizer=bytes", "--config.model.vocab_size=300",
    ]  # fmt: skip
    steps = 1 if "--no-jit" in extra else 4  # one operation at a time, a step takes a minute
    options.append(f"--config.train.num_steps={steps}")
    command = [sys.executable, "-m", "jaxlm.cli", "train", "--config", config, *options, "--shrink", *extra]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "r-shrunk" / "run.json").read_text())
    assert record["mesh"]["fsdp"] == 2 and record["config"]["model"]["rope"]["scaling"] == "llama3"
    assert f"step {steps}/{steps}" in done.stdout and "attn/q/kernel" in done.stdout and "⟦" in done.stdout


@pytest.mark.parametrize("config", sorted((ROOT / "configs").rglob("*.py")), ids=lambda p: p.stem)
def test_every_config_instantiates(config):
    from jaxlm.recipes.train import load_recipe, shrink

    recipe, cfg = load_recipe(str(config), [])
    # These start from a folder that the user has.
    if config.parent.name == "medse" or config.stem in ("ablation", "dropout"):
        with pytest.raises(ValueError, match=r"(all-MiniLM-L6-v2|runs/simcse_pretrain/encoder): no config.json"):
            shrink(recipe, cfg)
        return
    small = shrink(recipe, cfg)
    assert small.run_dir == f"{cfg.run_dir}-shrunk"
    if hasattr(cfg, "train"):
        length = small.data.max_tokens if cfg.recipe == "simcse" else small.data.sequence_length
        assert small.train.num_steps <= 4 and length <= 64
