"""`jaxlm eval` on STS: what is there is evaluated, what is not is named, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxlm.cli import main
from jaxlm.recipes import sts as recipe

CONFIG = str(Path(__file__).parents[2] / "configs" / "eval" / "sts.py")


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    """In place of an encoder: vectors that count letters."""

    def encode(texts, **options):
        return np.array([[t.count(c) for c in "abcdefgh"] for t in texts], np.float32)

    monkeypatch.setattr(recipe.Encoder, "load", lambda folder: SimpleNamespace(encode=encode))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "sts" / "2013").mkdir(parents=True)
    rows = [("4", "a b", "a b c"), ("1", "a b", "c d e"), ("3", "b c", "a b c"), ("", "x", "y")]
    (tmp_path / "sts" / "2013" / "OnWN.test.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return tmp_path


def test_what_is_there_is_evaluated_and_what_is_not_is_named(data, capsys):
    out = data / "out"
    options = [f"--config.run_dir={out}", f"--config.sts={data / 'sts'}", f"--config.sick={data / 'sick.txt'}"]
    assert main(["eval", "--config", CONFIG, "--config.model=m", *options]) == 0
    said = capsys.readouterr().out
    assert "STS13: 3 pairs, 1 without a score" in said
    for task in ("STS12: no file", "STS14: no file", "STS16: no file", "sick.txt is not there"):
        assert f"not evaluated: {task}" in said or task in said
    (result,) = json.loads((out / "results.json").read_text())
    assert (result["task"], result["pairs"], result["missing"]) == ("STS13", 3, ["FNWN", "headlines"])
    # cosines 0.816, 0 and 0.816 against scores 4, 1 and 3
    assert result["spearman"] == pytest.approx(100 * np.sqrt(3) / 2)
    assert "STS13 (without FNWN, headlines) | 3 |" in (out / "table.md").read_text()


def test_without_files_or_paths_it_is_an_error(data, capsys):
    assert main(["eval", "--config", CONFIG, f"--config.sts={data}"]) == 1
    assert "no task could be evaluated" in capsys.readouterr().err
    assert main(["eval", "--config", CONFIG]) == 1
    assert "name at least one of sts (a folder), stsb and sick" in capsys.readouterr().err
