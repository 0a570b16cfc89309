"""Every kind of source on real files: random access is sequential access, and the split is stable."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.data.errors import BadRow
from jaxlm.data.sources import SourceConfig, open_source, part_of

ROWS = [{"text": f"row {i} é\n", "number": i} for i in range(23)]
LINES = "".join(json.dumps(row) + "\n" + ("\n" if i % 5 == 0 else "") for i, row in enumerate(ROWS)).encode()


def write_jsonl(folder: Path) -> SourceConfig:
    cut = LINES.index(b"\n", len(LINES) // 2) + 1
    (folder / "a.jsonl").write_bytes(LINES[:cut])
    (folder / "b.jsonl").write_bytes(LINES[cut:].rstrip(b"\n"))  # the last line does not end in a newline
    return SourceConfig("jsonl", path=str(folder))


def write_jsonl_gz(folder: Path) -> SourceConfig:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    return SourceConfig("jsonl", path=str(folder / "*.jsonl.gz"))


def write_jsonl_zst(folder: Path) -> SourceConfig:
    zstandard = pytest.importorskip("zstandard")
    frames = [zstandard.compress(LINES[i : i + 200]) for i in range(0, len(LINES), 200)]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    return SourceConfig("jsonl", path=str(folder / "a.jsonl.zst"))


def write_parquet(folder: Path) -> SourceConfig:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:16]), folder / "a.parquet", row_group_size=3)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[16:]), folder / "b.parquet", row_group_size=4)
    return SourceConfig("parquet", path=str(folder))


def write_arrayrecord(folder: Path) -> SourceConfig:
    from array_record.python.array_record_module import ArrayRecordWriter

    for name, rows in (("a", ROWS[:5]), ("b", ROWS[5:])):
        writer = ArrayRecordWriter(str(folder / f"{name}.array_record"), "group_size:1")
        for row in rows:
            writer.write(json.dumps(row).encode())
        writer.close()
    return SourceConfig("arrayrecord", path=str(folder))


def write_memory(folder: Path) -> SourceConfig:
    return SourceConfig("memory", rows=tuple(ROWS))


WRITERS = [write_jsonl, write_jsonl_gz, write_jsonl_zst, write_parquet, write_arrayrecord, write_memory]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__.removeprefix("write_"))
def test_random_access_is_sequential_access(write, tmp_path):
    cfg = write(tmp_path)
    source = open_source(cfg)
    assert [source[i] for i in range(len(source))] == ROWS
    fresh = open_source(cfg)
    for i in np.random.default_rng(0).permutation(len(ROWS)):
        assert fresh[int(i)] == ROWS[i]
    assert len({source.origin(i) for i in range(len(source))}) == len({source.key(i) for i in range(len(source))}) == 23
    for beyond in (-1, 23):
        if cfg.kind != "memory":
            with pytest.raises(IndexError, match=f"row {beyond} of 23"):
                source[beyond]


@pytest.mark.parametrize("write", WRITERS, ids=lambda w: w.__name__.removeprefix("write_"))
def test_train_and_heldout_are_disjoint_and_whole(write, tmp_path):
    cfg = write(tmp_path)
    parts = [SourceConfig(**vars(cfg) | {"part": part, "heldout_share": 0.4}) for part in ("train", "heldout")]
    numbers = [[row["number"] for row in map(s.__getitem__, range(len(s)))] for s in map(open_source, parts)]
    assert sorted(numbers[0] + numbers[1]) == list(range(23))
    assert numbers[0] and numbers[1]


def test_origins_name_file_and_row(tmp_path):
    source = open_source(write_jsonl(tmp_path))
    first = source.origin(0)
    assert first == f"{(tmp_path / 'a.jsonl').as_posix()}:1"
    assert source.origin(1).endswith("a.jsonl:3")  # the blank second line is counted
    parquet = open_source(write_parquet(tmp_path))
    assert [parquet.origin(i).rsplit("/", 1)[1] for i in (0, 15, 16, 22)] == [
        "a.parquet:0", "a.parquet:15", "b.parquet:0", "b.parquet:6",
    ]  # fmt: skip
    records = open_source(write_arrayrecord(tmp_path))
    assert records.origin(5).endswith("b.array_record:0")


def test_the_split_does_not_depend_on_where_the_files_lie(tmp_path, monkeypatch):
    for name in ("here", "there/deeper"):
        (tmp_path / name).mkdir(parents=True)
        write_jsonl(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path / "here"), "there/deeper", "here/*.jsonl", str(tmp_path / "*" / "deeper" / "*.jsonl")]
    sources = [open_source(SourceConfig("jsonl", path=p)) for p in paths[:3]]
    keys = [[s.key(i) for i in range(len(s))] for s in sources]
    assert keys[0] == keys[1] == keys[2]
    assert keys[0][0] == "a.jsonl:1"
    below_glob = open_source(SourceConfig("jsonl", path=paths[3]))
    assert below_glob.key(0) == "there/deeper/a.jsonl:1"


def test_the_split_is_pinned():
    """If these move, the held-out text of every run that exists becomes training text of the next."""
    assert [i for i in range(40) if part_of(f"a.jsonl:{i}", 0.2) == "heldout"] == [6, 7, 8, 9, 13, 16, 17, 18, 27, 29]
    share = np.mean([part_of(f"part-{i % 7}.jsonl:{i}", 0.1) == "heldout" for i in range(20_000)])
    assert abs(share - 0.1) < 3 * (0.1 * 0.9 / 20_000) ** 0.5


def test_text_files_one_document_each(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two\r\nlines\n")  # line ends stay as they are
    (tmp_path / "sub" / "a.md.gz").write_bytes(gzip.compress("é".encode()))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    source = open_source(SourceConfig("text", path=str(tmp_path)))
    assert [source[i] for i in range(len(source))] == [{"text": "two\r\nlines\n"}, {"text": "é"}]
    assert [source.key(i) for i in range(2)] == ["b.txt", "sub/a.md.gz"]
    both = (str(tmp_path / "sub"), str(tmp_path / "b.txt"), str(tmp_path / "*.txt"))
    assert len(open_source(SourceConfig("text", path=both))) == 2  # a file that is named twice is read once


def test_stdlib_is_the_same_for_every_process_and_split_by_file():
    train, heldout = (open_source(SourceConfig("stdlib", part=part)) for part in ("train", "heldout"))
    names = [{s.key(i) for i in range(len(s))} for s in (train, heldout)]
    assert not names[0] & names[1]
    assert {"json/decoder.py", "argparse.py"} <= names[0] | names[1]
    assert not any("site-packages" in name or "test" in name.split("/")[:-1] for name in names[0] | names[1])
    code = (
        "from jaxlm.data.sources import *; s = open_source(SourceConfig('stdlib', part='heldout'));"
        "print(*[s.key(i) for i in range(len(s))], sep='\\n')"
    )
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert again == [heldout.key(i) for i in range(len(heldout))]
    assert "import" in train[3]["text"]


def test_tfds_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class TinyText(tfds.core.GeneratorBasedBuilder):
        """Seven rows."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {"text": tfds.features.Text(), "turns": tfds.features.Sequence(tfds.features.Text())}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"text": f"é {i}", "turns": ["ä", "b"]}) for i in range(7))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = TinyText(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    folder = str(builder.data_dir)
    source = open_source(SourceConfig("tfds", path=folder))
    assert sorted(source[i]["text"] for i in range(len(source))) == [f"é {i}" for i in range(7)]
    assert source[0]["turns"] == ["ä", "b"]
    assert source.origin(3) == f"{folder}[train]:3"
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        open_source(SourceConfig("tfds", path=folder, split="test"))
    with pytest.raises(ValueError, match=r"not a prepared TFDS data set.*dataset_info\.json"):
        open_source(SourceConfig("tfds", path=str(tmp_path)))


@pytest.mark.parametrize("write", [write_jsonl, write_parquet, write_memory], ids=lambda w: w.__name__)
def test_version_follows_the_content(write, tmp_path):
    cfg = write(tmp_path)
    before = open_source(cfg).version()
    assert open_source(cfg).version() == before
    if cfg.kind == "memory":
        assert open_source(SourceConfig("memory", rows=tuple(ROWS[:-1]))).version() != before
    else:
        path = next(tmp_path.glob("a.*"))
        path.write_bytes(path.read_bytes())
        path.touch()
        assert open_source(cfg).version() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="jsonl"), "needs a path"),
        (dict(kind="jsonl", path="/nowhere/*.jsonl"), r"no files at '/nowhere/\*\.jsonl'"),
        (dict(kind="jsonl", path="/nowhere/a.jsonl"), "no files at '/nowhere/a.jsonl'"),
        (dict(kind="xml"), "expected one of text, lines, stdlib, jsonl"),
        (dict(kind="stdlib", path="x"), "takes no path"),
        (dict(kind="stdlib", rows=({},)), "rows are for the kind 'memory'"),
        (dict(kind="memory"), "none of its 0 rows"),
        (dict(kind="stdlib", part="heldout", heldout_share=1.0), "between 0 and 1"),
        (dict(kind="stdlib", limit=0), "at least 1"),
        (dict(kind="tfds", path=("a", "b")), "one prepared data set"),
    ],
)
def test_a_wrong_config_says_how_to_mend_it(options, message):
    with pytest.raises(ValueError, match=message):
        open_source(SourceConfig(**options))


def test_limit_counts_rows_of_the_part(tmp_path):
    cfg = write_jsonl(tmp_path)
    limited = open_source(SourceConfig(**vars(cfg) | {"part": "train", "limit": 3}))
    whole = open_source(SourceConfig(**vars(cfg) | {"part": "train"}))
    assert [limited[i] for i in range(len(limited))] == [whole[i] for i in range(3)]


@pytest.mark.parametrize("suffix", ["gz", "zst", "bz2"])
def test_a_cut_off_compressed_file_is_refused(suffix, tmp_path):
    import bz2

    if suffix == "zst":
        compress = pytest.importorskip("zstandard").compress
    else:
        compress = {"gz": gzip.compress, "bz2": bz2.compress}[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(compress(LINES))
    assert len(open_source(SourceConfig("jsonl", path=str(path)))) == 23
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}: cannot be decompressed"):
        open_source(SourceConfig("jsonl", path=str(path)))


def test_a_cut_off_parquet_file_is_refused(tmp_path):
    cfg = write_parquet(tmp_path)
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"not a whole Parquet file among .*b\.parquet"):
        open_source(cfg)


def test_zst_without_the_extra_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(b"")
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxlm\[zstd\]'"):
        open_source(SourceConfig("jsonl", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("line", "reason", "found"),
    [
        (b'{"text": "a"', "malformed JSON", "column 13"),
        (b'{"text": "\xff"}', "broken UTF-8", "invalid start byte at byte 10"),
        (b"[1]", "wrong type", "expected a JSON object, found list"),
        (b"[" * 100_000, "malformed JSON", "nested too deeply"),
    ],
    ids=["malformed", "utf8", "list", "deep"],
)
def test_a_bad_line_is_named(line, reason, found, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    source = open_source(SourceConfig("jsonl", path=str(tmp_path)))
    assert source[0] == {"text": "good"}
    with pytest.raises(BadRow, match=rf"a\.jsonl:3: {reason}: .*{found}") as error:
        source[1]
    assert error.value.reason == reason


def test_broken_text_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xc3")
    with pytest.raises(BadRow, match=r"a\.txt: broken UTF-8: unexpected end of data at byte 2"):
        open_source(SourceConfig("text", path=str(tmp_path)))[0]


def test_arrayrecord_text_and_bad_rows(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    for record in (b"plain text", b'{"text": 1', b"\xff"):
        writer.write(record)
    writer.close()
    source = open_source(SourceConfig("arrayrecord", path=str(tmp_path), text_field="body"))
    assert source[0] == {"body": "plain text"}
    with pytest.raises(BadRow, match=r"a\.array_record:1: malformed JSON"):
        source[1]
    with pytest.raises(BadRow, match=r"a\.array_record:2: broken UTF-8"):
        source[2]


def test_real_files(shared_data):
    problems = open_source(SourceConfig("jsonl", path=str(shared_data / "gsm8k" / "train.jsonl.gz")))
    assert len(problems) == 7473
    assert set(problems[7000]) == {"question", "answer"}
    peps = open_source(SourceConfig("jsonl", path=str(shared_data / "corpus" / "*.jsonl.gz")))
    assert sum(len(peps[i]["text"].encode()) for i in range(len(peps))) == 10_186_748
