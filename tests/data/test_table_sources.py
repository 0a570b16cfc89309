"""CSV, TSV and line sources on real files: quoting, headers, messages."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pytest

from jaxlm.data.errors import BadRow
from jaxlm.data.sources import SourceConfig, open_source

ROWS = [["plain", "1"], ['a "quoted", field', "2"], ["two\nlines\u2028in one", "3"], ["", "4"]]


def rows_of(cfg: SourceConfig) -> list[dict[str, str]]:
    source = open_source(cfg)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("named", ["header", "columns"])
def test_csv_reads_what_pythons_writer_wrote(tmp_path: Path, named: str) -> None:
    names = ("text", "number")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([*([list(names)] if named == "header" else []), *ROWS])
    cfg = SourceConfig("csv", path=str(tmp_path), columns=names if named == "columns" else ())
    assert rows_of(cfg) == [dict(zip(names, row)) for row in ROWS]


def test_tsv_keeps_quotes_and_reads_several_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress(b'score\ttext\r\n5\tsay "hi"\r\n\r\n\tun"even\r\n'))
    (tmp_path / "b.tsv").write_bytes(b"score\ttext\n1\tlast")
    cfg = SourceConfig("tsv", path=str(tmp_path))
    assert [row["text"] for row in rows_of(cfg)] == ['say "hi"', 'un"even', "last"]
    source = open_source(cfg)
    assert source.origin(1).endswith("a.tsv.gz:4") and source.key(2) == "b.tsv:0"


def test_a_row_of_another_width_and_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("one\ttwo\n1\t2\n1\t2\t3\n")
    with pytest.raises(BadRow, match=r"a.tsv:3: wrong number of fields: expected 2 fields \(one, two\), found 3"):
        rows_of(SourceConfig("tsv", path=str(tmp_path / "a.tsv")))
    (tmp_path / "b.tsv").write_bytes(b"one\n1\n\xff\n")
    with pytest.raises(ValueError, match=r"b.tsv:3: expected UTF-8"):
        open_source(SourceConfig("tsv", path=str(tmp_path / "b.tsv")))
    (tmp_path / "c.csv").write_text('one,two\n1,"never closed\n')
    with pytest.raises(ValueError, match=r"c.csv:2: not a row of a CSV file"):
        open_source(SourceConfig("csv", path=str(tmp_path / "c.csv")))
    with pytest.raises(ValueError, match="columns name the fields of csv and tsv"):
        SourceConfig("jsonl", path="a.jsonl", columns=("a",))


def test_lines_are_rows_and_blank_ones_are_none(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_bytes("erste\r\n\n zweite é \nlast".encode())
    cfg = SourceConfig("lines", path=str(tmp_path / "wiki.txt"), text_field="sentence")
    assert rows_of(cfg) == [{"sentence": "erste"}, {"sentence": " zweite é "}, {"sentence": "last"}]
    assert open_source(cfg).origin(2).endswith("wiki.txt:4")
