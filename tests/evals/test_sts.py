"""STS evaluation: the protocol, its files, and the lexical baselines against scikit-learn and published figures."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from jaxlm.evals import lexical, sts

TEXTS = ["A cat sat on the mat.", "The cat's mat, 2 cats!", "", "Ein Hund läuft.", "a a a b", "cat cat dog"]


def letters(texts):
    """Vectors that count letters: an encoder whose cosines anyone can compute."""
    return np.array([[text.lower().count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for text in texts], float)


@pytest.mark.parametrize("name", lexical.BASELINES)
def test_tfidf_is_that_of_scikit_learn(name):
    text = pytest.importorskip("sklearn.feature_extraction.text")
    terms = lexical.BASELINES[name]
    theirs = text.TfidfVectorizer(analyzer=terms, sublinear_tf=True).fit_transform(TEXTS)
    ours = lexical.tfidf(TEXTS, terms)
    assert ours.shape == theirs.shape
    np.testing.assert_allclose((ours @ ours.T).toarray(), (theirs @ theirs.T).toarray(), atol=1e-12)


def test_baselines_of_stsb_dev_are_the_published_ones(shared_data):
    pairs = sts.read_stsb(shared_data / "stsb" / "stsb-en-dev.csv")
    assert (len(pairs.first), pairs.unrated) == (1500, 0)
    found = sts.lexical_baselines(pairs)
    assert {name: round(value, 1) for name, value in found.items()} == {"TF-IDF words": 75.3, "TF-IDF characters": 76.8}


def test_real_tasks_are_read_whole(shared_data):
    pairs, missing = sts.read_semeval(shared_data / "sts", "STS15")
    assert (len(pairs.first), pairs.unrated, missing) == (3000, 5500, ())
    pairs, missing = sts.read_semeval(shared_data / "sts", "STS14")
    assert (len(pairs.first), pairs.unrated, missing) == (3750, 0, ())
    found = sts.lexical_baselines(pairs)
    # The published ones are fitted on all tasks at once.
    assert found["TF-IDF words"] == pytest.approx(67.4, abs=1.5)
    assert found["TF-IDF characters"] == pytest.approx(67.8, abs=1.5)


def write_task(folder, **subsets):
    (folder / "2013").mkdir(parents=True)
    for name, rows in subsets.items():
        (folder / "2013" / f"{name}.test.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    return folder


def test_subsets_are_one_correlation_and_the_unrated_are_counted(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdef"), 5)) for _ in range(40)]
    scores = [f"{s:.2f}" for s in rng.uniform(0, 5, 20)]
    rows = [(score, a, b) for score, a, b in zip(scores, texts[:20], texts[20:], strict=True)]
    folder = write_task(tmp_path, FNWN=[*rows[:5], ("", "x", "y")], headlines=rows[5:])
    pairs, missing = sts.read_semeval(folder, "STS13")
    result = sts.evaluate("STS13", pairs, letters, missing=missing)
    a, b = letters(texts[:20]), letters(texts[20:])
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert result.spearman == pytest.approx(100 * spearmanr(cosine, [float(s) for s in scores]).statistic)
    assert np.isnan(result.baselines["TF-IDF words"])  # no two texts share a word: nothing to correlate
    assert (result.pairs, result.unrated, result.missing) == (20, 1, ("OnWN",))
    assert "STS13 (without OnWN) | 20 |" in sts.table([result]) and "TF-IDF words" in sts.table([result])


def test_quotes_are_text_in_semeval_and_quoting_in_stsb(tmp_path):
    folder = write_task(tmp_path, OnWN=[("5", 'a "b', 'c"')])
    assert sts.read_semeval(folder, "STS13")[0].first == ['a "b']
    path = tmp_path / "b.csv"
    path.write_text('"a, ""b""",c,5.000\r\n')
    pairs = sts.read_stsb(path)
    assert (pairs.first, pairs.second, pairs.score.tolist()) == (['a, "b"'], ["c"], [5.0])


def test_sick_is_read_by_its_columns(tmp_path):
    path = tmp_path / "sick.txt"
    path.write_text("pair_ID\tsentence_A\tsentence_B\trelatedness_score\tjudgment\n1\ta\tb\t4.5\tNEUTRAL\n")
    assert sts.read_sick(path)[:2] == (["a"], ["b"]) and sts.read_sick(path).score.tolist() == [4.5]
    path.write_text("pair_ID\tA\n1\ta\n")
    with pytest.raises(
        ValueError, match="expected the columns relatedness_score, sentence_A, sentence_B, found pair_ID"
    ):
        sts.read_sick(path)


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    with pytest.raises(ValueError, match="no file of FNWN, headlines, OnWN in .*2013; they can be had from github"):
        sts.read_semeval(tmp_path, "STS13")
    with pytest.raises(ValueError, match="stsb.csv is not there; it can be had from github.com/PhilipMay"):
        sts.read_stsb(tmp_path / "stsb.csv")
    with pytest.raises(ValueError, match="unknown task 'STS17': expected one of STS12"):
        sts.read_semeval(tmp_path, "STS17")
    folder = write_task(tmp_path, OnWN=[("5", "a")])
    with pytest.raises(ValueError, match="OnWN.test.tsv:1: expected 3 columns, found 2"):
        sts.read_semeval(folder, "STS13")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"5\ta\tb\nfive\ta\tb\n", "OnWN.test.tsv:2: expected a score, found 'five'"),
        (b"5\ta\t\xff\n", "OnWN.test.tsv: expected a table in UTF-8"),
    ],
)
def test_bad_rows_name_their_file(tmp_path, content, message):
    folder = write_task(tmp_path)
    (folder / "2013" / "OnWN.test.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sts.read_semeval(folder, "STS13")


def test_a_short_row_of_sick_and_too_few_pairs_are_refused(tmp_path):
    path = tmp_path / "sick.txt"
    path.write_text("pair_ID\tsentence_A\tsentence_B\trelatedness_score\n1\ta\tb\n")
    with pytest.raises(ValueError, match="sick.txt:2: expected 4 columns, found 3"):
        sts.read_sick(path)
    with pytest.raises(ValueError, match="STS13: a correlation needs at least 2 pairs with a score, found 1"):
        sts.evaluate("STS13", sts.Pairs(["a"], ["b"], np.ones(1)), letters)
