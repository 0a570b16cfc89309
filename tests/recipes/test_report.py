"""jaxlm report: the page about real runs, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from jaxlm import cli
from jaxlm.recipes import report

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.recipe = "lm"
    config.run_dir = "{run_dir}"
    config.model = dict(vocab_size=259, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=16,
                        max_length=32, scan_layers=False)
    config.data = dict(tokenizer="bytes", sequence_length=16, batch_size=8, train=[dict(kind="text", path="{text}")])
    config.optim = dict(learning_rate=1e-2, warmup_steps=1)
    config.train = dict(num_steps=30, log_every=1)
    return config
"""
EVIL = "</script><img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, the second with another rate, and its training continued."""
    base = tmp_path_factory.mktemp("runs")
    (base / "text.txt").write_text("".join(f"{i} squared is {i * i}.\n" for i in range(500)))
    (base / "config.py").write_text(CONFIG.format(run_dir=base / "one", text=base / "text.txt"))
    command = ["train", "--config", str(base / "config.py")]
    assert cli.main(command) == 0
    other = [*command, f"--config.run_dir={base / 'two'}", "--config.optim.learning_rate=0.003"]
    assert cli.main([*other, "--config.train.num_steps=10"]) == 0
    assert cli.main(other) == 0
    return base


def test_figures_and_page_say_what_the_runs_did(runs, capsys):
    out = runs / "page" / "report.html"
    assert cli.main(["report", str(runs / "one"), str(runs / "two"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "one: 30 steps, " in printed and "goodput" in printed and "optim.learning_rate: 0.01 | 0.003" in printed
    page = out.read_text()
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page.replace("http://www.w3.org/2000/svg", ""))
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    one, two = data["runs"]
    lines = [json.loads(line) for line in (runs / "one" / "metrics.jsonl").read_text().splitlines()]
    assert one["curves"]["train/loss"] == [
        [line["step"] for line in lines if "train/loss" in line], [x["train/loss"] for x in lines if "train/loss" in x]
    ]  # fmt: skip
    assert (one["facts"]["starts"], two["facts"]["starts"]) == ("1", "2")
    assert two["seconds"]["compile"] > 0 and two["seconds"]["steps"] > 0 and two["seconds"]["redone"] == 0
    assert set(data["differs"]) == {"run_dir", "optim.learning_rate"}


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "expected the folder of a run that has begun" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), str(tmp_path)]) == 1
    assert "expected different runs" in capsys.readouterr().err


def test_long_curves_are_thinned_and_keep_their_end():
    lines = [{"step": i, "train/loss": None if i == 7 else float(i)} for i in range(5001)]
    steps, values = report.curve(lines, "train/loss")
    assert len(steps) <= report.MOST_POINTS and steps[0] == 0 and steps[-1] == 5000 and values[-1] == 5000.0


@pytest.mark.slow
def test_a_browser_draws_the_curves_and_text_stays_text(runs, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    image = pytest.importorskip("PIL.Image")
    found = [report.read_run(runs / name, name) for name in ("one", "two")]
    found[1] = found[1]._replace(name=EVIL)
    path, shot = tmp_path / "report.html", tmp_path / "shot.png"
    path.write_text(report.page(found))

    def browse(*options):
        plain = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
        done = subprocess.run(
            [browser, *plain, "--virtual-time-budget=2000", *options], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    dom = browse("--dump-dom", f"file://{path}#metric=perf/steps_per_s")
    assert len(re.findall(r'<path [^>]*class="curve(?: raw)?"', dom)) == 4  # raw and smoothed, of two runs
    assert dom.count('class="stack"') == 2 and "&lt;/script&gt;&lt;img" in dom and "<img" not in dom
    assert '<option value="train/loss">' in dom
    browse(f"--screenshot={shot}", "--window-size=1000,1200", f"file://{path}")
    colours = {colour for _, colour in image.open(shot).convert("RGB").getcolors(1 << 24)}
    assert {(0, 114, 178), (213, 94, 0), (0, 158, 115)} <= colours  # two runs, and steps in the bar of time
