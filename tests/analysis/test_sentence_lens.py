"""SentenceLens: the states are those of the roll, and the page shows them in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from jaxlm.analysis import sentence_lens
from jaxlm.analysis.sentence_lens import Lens, Reading
from jaxlm.generate.latent import roll_continuous
from jaxlm.models import decoder, latent
from jaxlm.models import spec as specs
from jaxlm.models.config import DecoderConfig

MODEL = DecoderConfig(
    vocab_size=40, width=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=32, max_length=32
)
CFG = latent.LatentConfig(MODEL, 16, 16)
EVIL = '</script><img src=x onerror="document.title=1">'


def lens(question: str, word: str) -> Lens:
    plain = [[Reading(f"{word} {step}{layer}", 0.2 + 0.3 * layer, 0.5) for layer in range(2)] for step in range(3)]
    normed = [[Reading(f"normed {word} {step}{layer}", 0.9, 0.1) for layer in range(2)] for step in range(3)]
    return Lens(question, (f"{word} 01", "other", EVIL), plain, normed)


def test_the_last_layer_is_what_the_roll_feeds_back():
    params = specs.init(jax.random.key(0), latent.spec(CFG))
    text_params = specs.init(jax.random.key(1), decoder.spec(MODEL))
    question = np.array([5, 9, 12, 7])
    plain, normed = sentence_lens.layer_states(params, question, cfg=CFG, num_steps=2)
    rolled = roll_continuous(
        params, text_params, question[None], np.ones((1, 4), np.int32), cfg=CFG, decoder_cfg=MODEL, num_sentences=2,
        end_id=7, max_tokens=3,
    )  # fmt: skip
    np.testing.assert_allclose(plain[:, -1], rolled.outputs[0], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(plain[:, -1], normed[:, -1])
    first = decoder.forward(params["model"], question[None], cfg=MODEL, collect=("residual",)).collected["residual"]
    np.testing.assert_allclose(plain[0, 0], first[0, 0, -1], rtol=1e-5)
    assert not np.allclose(plain[0, 0], normed[0, 0])

    def read(vectors):
        return [Reading(str(i), float(np.sum(v)), 0.0) for i, v in enumerate(np.asarray(vectors))]

    found = sentence_lens.look(params, question, read, cfg=CFG, num_steps=2, text="q", steps=("s",))
    assert [[r.text for r in row] for row in found.plain] == [["0", "1"], ["2", "3"]]
    mapped = latent.map_vectors(params["out"], plain)
    np.testing.assert_allclose(found.plain[1][0].probability, mapped[1, 0].sum(), rtol=1e-4)


def test_readings_are_means_over_tokens():
    tokens, segments = np.array([[5, 6, 0], [7, 0, 0]]), np.array([[1, 1, 0], [1, 0, 0]])
    logprob, entropy = np.log([[0.5, 0.125, 9.0], [0.25, 9.0, 9.0]]), np.array([[1.0, 3.0, 9], [0.5, 9, 9]])
    found = sentence_lens.readings(tokens, segments, logprob, entropy, lambda ids: "-".join(map(str, ids)))
    assert [r.text for r in found] == ["5-6", "7"]
    np.testing.assert_allclose([r[1:] for r in found], [[0.25, 2.0], [0.25, 0.5]])


def test_the_page_is_whole_in_itself_and_text_cannot_become_html(tmp_path):
    path = sentence_lens.write([lens("one", "first"), lens(EVIL, "second")], tmp_path, title="a <b> title")
    page = path.read_text()
    assert page.count("</script>") == 2 and "<title>a &lt;b&gt; title</title>" in page
    assert not re.search(r'(src|href)\s*=\s*["\']?(https?:)?//', page)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == json.loads((tmp_path / "lens.json").read_text())
    assert json.loads(data)[1]["question"] == EVIL


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")

    def run(url: str, *options: str) -> str:
        plain = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}")
        command = [browser, *plain, "--virtual-time-budget=2000", *options, url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    return run


@pytest.mark.slow
def test_a_browser_shows_the_grid_that_the_address_names(tmp_path, browse):
    path = sentence_lens.write([lens("one", "first"), lens(EVIL, "second")], tmp_path, title="Lens")
    plain = browse(f"file://{path}", "--dump-dom")
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", plain)
    assert cells == ["first 00", "first 01", "first 10", "first 11", "first 20", "first 21"]
    assert re.findall(r'<td[^>]*class="gold"[^>]*>([^<]*)</td>', plain) == ["first 01"]
    normed = browse(f"file://{path}#question=2&norm=1", "--dump-dom")
    shares = re.findall(r"<th[^>]*>(\d+) %</th>", plain)
    assert shares == ["0", "33"]  # of the two questions' three steps each, one cell of the second layer
    assert "normed second 21</td>" in normed and "<title>Lens</title>" in normed  # and not 1
    assert "&lt;img" in normed and "<img" not in normed


@pytest.mark.slow
@pytest.mark.parametrize(("width", "seen"), [(1200, (0.2, 0.5)), (500, (0.2,))], ids=["desktop", "phone"])
def test_a_screenshot_has_the_colours_of_the_probabilities(tmp_path, browse, width, seen):
    image = pytest.importorskip("PIL.Image")
    path = sentence_lens.write([lens("one", "first")], tmp_path, title="Lens")
    shot = tmp_path / "shot.png"
    browse(f"file://{path}", f"--screenshot={shot}", f"--window-size={width},800", "--hide-scrollbars")
    pixels = np.asarray(image.open(shot).convert("RGB")).reshape(-1, 3).astype(int)
    for probability in seen:  # of the mark rgb(37, 99, 190) on white; on a phone the grid is scrolled to the right
        colour = 255 + (np.array([37, 99, 190]) - 255) * 0.45 * probability
        near = np.abs(pixels - colour).max(axis=1) <= 2
        assert near.mean() > 0.01, probability
