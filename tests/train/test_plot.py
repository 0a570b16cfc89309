"""The loss curve is drawn, and drawn from the right numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from jaxlm.train.plot import _BASELINES, _EVALS, _TRAIN, plot_run, smooth


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "train/loss": 8 / (1 + s / 50), "perf/mfu": 0.5} for s in range(10, 510, 10)]
    lines += [{"step": s, "eval/loss": 8.5 / (1 + s / 50)} for s in range(0, 510, 100)]
    lines[3]["train/loss"] = None
    path.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"])))
    return path


def count(image: np.ndarray, color: str, tolerance: int = 40) -> int:
    rgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(image.astype(int) - rgb).max(axis=-1) <= tolerance).sum())


def test_curves_points_and_baselines_are_on_the_picture(metrics, tmp_path):
    plot_run(metrics, tmp_path / "bare.png", metric="loss")
    plot_run(metrics, tmp_path / "full.png", metric="loss", baselines={"zlib": 3.0, "lzma": 2.5}, title="a run")
    bare, full = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("bare", "full"))
    assert bare.shape == full.shape == (1000, 1600, 3)
    assert count(bare, _TRAIN) > 2000 and count(bare, _EVALS[0]) > 2000
    assert count(bare, _EVALS[1]) == 0
    assert count(full, _BASELINES, 10) > count(bare, _BASELINES, 10) + 1000


def test_a_metric_that_is_not_there(metrics, tmp_path):
    with pytest.raises(ValueError, match="no line has the metric 'bits_per_byte'"):
        plot_run(metrics, tmp_path / "x.png")


def test_smoothing_keeps_a_constant_and_the_middle_of_a_slope():
    values = np.full(50, 3.0)
    values[7] = np.nan
    np.testing.assert_allclose(smooth(values, 4.0), 3.0, rtol=1e-14)
    slope = np.arange(101.0)
    np.testing.assert_allclose(smooth(slope, 3.0)[20:80], slope[20:80], rtol=1e-12)
    assert len(smooth(np.array([1.0]), 5.0)) == 1
