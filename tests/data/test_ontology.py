"""Reading OBO files: escapes, comments, modifiers, unions, the closure of is_a, and the real Disease Ontology."""

from __future__ import annotations

import gzip
import itertools

import numpy as np
import pytest

from jaxlm.data.ontology import Ontology, Term, read_obo

HEADER = 'format-version: 1.2\nsubsetdef: a "b"\n\n'
FULL = r"""
[Term]
id: X:1 ! the id
name: cell\: "a \{b\}" wow! \! ! a comment ! and more
def: "Says \"so!\" {x=y}:\n a\\b, [1]\t[2]." [url:http\://a\]b "with \" ] and !", PMID:1] {comment="a ! b", s="c"} ! c
comment: synonym: "not one" EXACT []
synonym: "alpha" EXACT []
synonym: "alpha" EXACT [PMID:1]
synonym: "be\"ta" EXACT OMO:0003012 [X:1 "d"] {synonymtypedef="acronym"}
synonym: "gamma" NARROW [] ! narrow
synonym: "delta" []
synonym: "two \
lines" BROAD []
is_a: X:2 {is_inferred="true"} ! parent
is_a: X:9 ! outside
intersection_of: X:7

[Typedef]
id: part_of
name: part of

! whole lines may be comments, too
[Term]
id: X:2
name: root {a="b"}

[Term]
id: X:3
name: obsolete thing
is_obsolete: true
"""


def write(folder, text, name="a.obo"):
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_every_part_of_a_term(tmp_path):
    ontology = read_obo(write(tmp_path, HEADER + FULL, "a.obo.gz"))
    assert ontology.terms == {
        "X:1": Term(
            "X:1",
            'cell: "a {b}" wow! !',
            'Says "so!" {x=y}:\n a\\b, [1]\t[2].',
            ("alpha", 'be"ta'),
            {"BROAD": ("two lines",), "NARROW": ("gamma",), "RELATED": ("delta",)},
            ("X:2", "X:9"),
        ),
        "X:2": Term("X:2", "root"),
    }
    assert ontology.num_obsolete == 1
    assert ontology.ancestors("X:1") == {"X:2"}


def test_a_term_in_several_files_is_their_union(tmp_path):
    one = '[Term]\nid: 1\nname: a\nsynonym: "b" EXACT []\nis_a: 2\n[Term]\nid: 2\nname: c\n'
    two = '[Term]\r\nid: 1\r\nname: a\r\ndef: "d" []\r\nsynonym: "e" EXACT []\r\nis_a: 3\r\n'
    write(tmp_path, one, "a.obo")
    write(tmp_path, two, "b.obo.gz")
    expected = Term("1", "a", "d", ("b", "e"), {}, ("2", "3"))
    assert read_obo(tmp_path).terms["1"] == expected
    assert read_obo([tmp_path / "b.obo.gz", str(tmp_path / "a.obo")]).terms["1"] == expected
    write(tmp_path, "[Term]\nid: 0\nname: y\n[Term]\nid: 2\nname: x\n", "z.obo")
    with pytest.raises(ValueError, match=r"z.obo:4: 2: name 'x' differs from 'c' at .*a.obo:6: read files of one rel"):
        read_obo(tmp_path)


def test_the_closure_is_that_of_a_boolean_matrix():
    rng = np.random.default_rng(0)
    order = rng.permutation(40)
    edges = np.triu(rng.random((40, 40)) < 0.06, 1)[np.ix_(order, order)]  # a hidden order, so no circle
    terms = {str(i): Term(str(i), "x", parents=tuple(str(j) for j in np.flatnonzero(edges[i]))) for i in range(40)}
    ontology = Ontology(terms)
    reach = np.linalg.matrix_power(np.eye(40, dtype=int) + edges, 40) > 0
    for i, j in itertools.product(range(40), repeat=2):
        assert (str(j) in ontology.ancestors(str(i))) == (reach[i, j] and i != j)
        assert ontology.related(str(i), str(j)) == (reach[i, j] or reach[j, i])
    with pytest.raises(ValueError, match="no term '40' among the 40 of the ontology"):
        ontology.related("1", "40")


def test_a_deep_hierarchy_and_a_circle():
    deep = {str(i): Term(str(i), "x", parents=(str(i + 1),) if i < 1999 else ()) for i in range(2000)}
    assert len(Ontology(deep).ancestors("0")) == 1999
    with pytest.raises(ValueError, match=r"is_a goes in a circle: \d+ -> \d+.* -> \d+; break it"):
        Ontology(deep | {"1999": Term("1999", "x", parents=("1997",))})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.obo: no .Term. stanza"),
        ("[Term]\nid: 1\n\n[Term]\nid: 2\nname: x", "a.obo:1: expected a 'name' in the .Term. stanza, found id"),
        ("[Term]\nid: 1\nname: x\nrubbish", "a.obo:4: expected `tag: value` in a .Term. stanza, found 'rubbish'"),
        ("[Term]\nid: 1\nname: x\n[Term", r"a.obo:4: expected `tag: value` .*, found '\[Term'"),
        ("[Term]\nid: 1\nname: x\nname: y", "a.obo:4: expected one 'name' in a stanza, found another"),
        ("[Term]\nid: 1\nname: ! x", "a.obo:3: expected a text, found '! x'"),
        ("[Term]\nid: 1\nname: x\nis_a: 2 y", "a.obo:4: expected an id, found '2 y'"),
        ("[Term]\nid: 1\nname: x\nis_a: ! y", "a.obo:4: expected an id, found '! y'"),
        ('[Term]\nid: 1\nname: x\ndef: "y [z]', 'a.obo:4: expected "text" .references., found \'"y .z.\''),
        ('[Term]\nid: 1\nname: x\ndef: "y" [z', 'a.obo:4: expected "text" .references.'),
        ('[Term]\nid: 1\nname: x\nsynonym: "y" exact []', "a.obo:4: .*scope of EXACT, BROAD, NARROW, RELATED, found"),
        ("[Term]\nid: 1\nname: x\\", "a.obo:3: the last line ends in a backslash"),
        ("[Term]\nid: 1\nname: \udcff", "a.obo:3: expected UTF-8, found b'name: .xff'"),
    ],
)
def test_broken_files_name_the_line(tmp_path, text, message):
    (tmp_path / "a.obo").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message):
        read_obo(tmp_path / "a.obo")


def test_the_disease_ontology(shared_data):
    ontology = read_obo(shared_data / "disease_ontology")
    terms = ontology.terms.values()
    defined = [t for t in terms if t.definition is not None]
    synonyms = [len(t.exact) + sum(map(len, t.other.values())) for t in defined]
    assert (len(terms), len(defined), ontology.num_obsolete) == (7355, 5697, 9)
    # The published count of synonyms is that of the terms with a definition.
    assert (np.count_nonzero(synonyms), sum(synonyms)) == (4269, 11989)
    assert sum(t.name.lower() in t.definition.lower() for t in defined) == 90
    # All parents of all files; a published 6,332 counts a term's last file alone.
    assert sum(parent in ontology.terms for t in terms for parent in t.parents) == 6790
    assert ontology.related("DOID:0001816", "DOID:4") and not ontology.related("DOID:0001816", "DOID:0050458")
