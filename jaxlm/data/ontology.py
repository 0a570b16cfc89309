"""Ontologies in the OBO format: terms with their names, definitions and synonyms, and the hierarchy of is_a."""

from __future__ import annotations

import dataclasses
import functools
import graphlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.sources import files

SCOPES = ("EXACT", "BROAD", "NARROW", "RELATED")
# Tags that stand at most once in a stanza; synonym and is_a are read too, and the rest is left out.
_SINGLE = ("id", "name", "def", "is_obsolete")

_QUOTED = r'"(?:[^"\\]|\\.)*"'
_TEXT = r'"((?:[^"\\]|\\.)+)"'
_MODIFIER = rf'[^\s={{}}",]+\s*=\s*(?:{_QUOTED}|[^\s={{}}",]+)'
_TAIL = rf"(?:\s*\{{\s*{_MODIFIER}(?:\s*,\s*{_MODIFIER})*\s*\}})?\s*(?:(?:^|(?<=\s))!.*)?"
_XREFS = rf'(?:\s*\[(?:{_QUOTED}|\\.|[^\]"\\])*\])?'
# The text is the shortest that modifiers and a comment can follow: a comment begins at its first free-standing "!".
_PLAIN = re.compile(rf"((?!!)(?:\\.|[^\\])+?){_TAIL}")
_ID = re.compile(rf"((?:\\.|[^\\\s!])+){_TAIL}")
_DEF = re.compile(rf"{_TEXT}{_XREFS}{_TAIL}")
_SYNONYM = re.compile(rf"{_TEXT}(?:\s+({'|'.join(SCOPES)})(?:\s+[^\s\[\]{{}}!\"]+)?)?{_XREFS}{_TAIL}")
_FORMS = {
    _PLAIN: "a text", _ID: "an id", _DEF: '"text" [references]',
    _SYNONYM: f'"text" SCOPE [references] with a scope of {", ".join(SCOPES)}',
}  # fmt: skip
_ESCAPE = re.compile(r"\\(.)")
_SPECIAL = {"n": "\n", "t": "\t", "W": " "}


@dataclasses.dataclass(frozen=True)
class Term:
    """A concept. exact: synonyms that mean the same; other: those of the scopes BROAD, NARROW and RELATED, by scope.

    parents: ids of its is_a, also where the term itself is not at hand.
    """

    id: str
    name: str
    definition: str | None = None
    exact: tuple[str, ...] = ()
    other: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    parents: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Ontology:
    """Terms by id, and the transitive closure of is_a. num_obsolete: terms left out for being obsolete.

    Raises ValueError for an is_a that leads back to its own term, naming the circle.

    >>> ontology = Ontology({t.id: t for t in (
    ...     Term("1", "disease"), Term("2", "cancer", parents=("1",)), Term("3", "sarcoma", parents=("2",)))})
    >>> sorted(ontology.ancestors("3")), ontology.related("1", "3")
    (['1', '2'], True)
    """

    terms: Mapping[str, Term]
    num_obsolete: int = 0

    def __post_init__(self) -> None:
        self._closure  # noqa: B018  (a circle is an error of the ontology, not of the first question)

    def ancestors(self, id: str) -> frozenset[str]:
        """Ids of all terms above: the parents, theirs, and so on, without the term itself.

        Only terms of the ontology count. Raises ValueError for an unknown id.
        """
        if id not in self._closure:
            raise ValueError(f"no term {id!r} among the {len(self.terms):,} of the ontology")
        return self._closure[id]

    def related(self, a: str, b: str) -> bool:
        """Whether the two are the same, or one is an ancestor of the other; siblings are not."""
        above_a, above_b = self.ancestors(a), self.ancestors(b)
        return a == b or a in above_b or b in above_a

    @functools.cached_property
    def _closure(self) -> dict[str, frozenset[str]]:
        parents = {id: [p for p in term.parents if p in self.terms] for id, term in self.terms.items()}
        try:
            order = list(graphlib.TopologicalSorter(parents).static_order())  # parents first
        except graphlib.CycleError as error:
            raise ValueError(f"is_a goes in a circle: {' -> '.join(error.args[1])}; break it in the file") from error
        closure: dict[str, frozenset[str]] = {}
        for id in order:
            closure[id] = frozenset(parents[id]).union(*(closure[p] for p in parents[id]))
        return closure


def read_obo(path: str | Path | Sequence[str | Path]) -> Ontology:
    """The union of OBO files of one release.

    path: a file (also compressed), a folder with .obo files, a glob, or several of these. A term that stands in several
    has the synonyms and parents of all of them: subset files leave out parents that are not in the subset.

    Raises ValueError naming file and line for a broken stanza, and for a term on whose name, definition or obsolescence
    the files disagree. Source: the OBO flat file format 1.2 and 1.4; other stanzas than [Term] are left out.
    """
    paths = (str(path),) if isinstance(path, str | Path) else tuple(str(p) for p in path)
    by_id: dict[str, list[_Stanza]] = {}
    for file in files.find(paths, (".obo",)):
        for stanza in _stanzas(file.path):
            by_id.setdefault(stanza.id, []).append(stanza)
    current = {id: stanzas for id, stanzas in by_id.items() if not _agreed(stanzas, "obsolete")}
    return Ontology({id: _merge(id, stanzas) for id, stanzas in current.items()}, len(by_id) - len(current))


class _Stanza(NamedTuple):
    origin: str
    id: str
    name: str
    obsolete: bool
    definition: str | None
    synonyms: list[tuple[str, str]]  # (scope, text)
    parents: list[str]


def _merge(id: str, stanzas: list[_Stanza]) -> Term:
    def texts(scope: str) -> tuple[str, ...]:
        return _unique(text for s in stanzas for found, text in s.synonyms if found == scope)

    return Term(
        id,
        _agreed(stanzas, "name"),
        _agreed([s for s in stanzas if s.definition is not None], "definition"),
        texts("EXACT"),
        {scope: texts(scope) for scope in SCOPES[1:] if texts(scope)},
        _unique(parent for s in stanzas for parent in s.parents),
    )


def _unique(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


def _agreed(stanzas: list[_Stanza], field: str) -> Any:
    """What all stanzas of a term say; None if there are none."""
    values = [getattr(s, field) for s in stanzas]
    for stanza, value in zip(stanzas, values):
        if value != values[0]:
            raise ValueError(
                f"{stanza.origin}: {stanza.id}: {field} {value!r} differs from {values[0]!r} at {stanzas[0].origin}: "
                "read files of one release together"
            )
    return values[0] if values else None


def _stanzas(path: Path) -> Iterator[_Stanza]:
    """The [Term] stanzas of a file."""
    kind, start, tags, num_terms = "", 0, dict[str, list[tuple[str, str]]](), 0
    for number, line in [*_lines(path), (0, "[End]")]:
        header = re.fullmatch(r"\[(\w+)\]\s*(?:!.*)?", line)
        if header:
            if kind == "Term":
                num_terms += 1
                yield _stanza(f"{path}:{start}", tags)
            kind, start, tags = header[1], number, {}
        elif kind == "Term":
            tag, colon, value = line.partition(":")
            if not colon:
                raise ValueError(f"{path}:{number}: expected `tag: value` in a [Term] stanza, found {line[:60]!r}")
            tags.setdefault(tag.strip(), []).append((f"{path}:{number}", value.strip()))
    if not num_terms:
        raise ValueError(f"{path}: no [Term] stanza: expected a file in the OBO format")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) without blank and comment lines; a backslash at its end joins a line with the next."""
    begun, start = "", 0
    for number, data in enumerate(files.read_bytes(path).splitlines(), 1):
        try:
            line = begun + data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: expected UTF-8, found {data[:40]!r}") from error
        start = start if begun else number
        if (len(line) - len(line.rstrip("\\"))) % 2:
            begun = line[:-1]
            continue
        begun = ""
        if line.strip() and not line.startswith("!"):
            yield start, line.strip()
    if begun:
        raise ValueError(f"{path}:{start}: the last line ends in a backslash: expected another one after it")


def _stanza(origin: str, tags: Mapping[str, list[tuple[str, str]]]) -> _Stanza:
    for tag in _SINGLE:
        if len(tags.get(tag, ())) > 1:
            raise ValueError(f"{tags[tag][1][0]}: expected one {tag!r} in a stanza, found another")
    for tag in ("id", "name"):
        if tag not in tags:
            raise ValueError(f"{origin}: expected a {tag!r} in the [Term] stanza, found {', '.join(tags) or 'nothing'}")
    definitions = _texts(_DEF, tags.get("def"))
    return _Stanza(
        origin,
        _texts(_ID, tags["id"])[0],
        _texts(_PLAIN, tags["name"])[0],
        _texts(_PLAIN, tags.get("is_obsolete")) == ["true"],
        definitions[0] if definitions else None,
        [(m[2] or "RELATED", _unescape(m[1])) for m in _matches(_SYNONYM, tags.get("synonym"))],  # the format's default
        _texts(_ID, tags.get("is_a")),
    )


def _texts(pattern: re.Pattern[str], values: list[tuple[str, str]] | None) -> list[str]:
    return [_unescape(m[1]) for m in _matches(pattern, values)]


def _matches(pattern: re.Pattern[str], values: list[tuple[str, str]] | None) -> Iterator[re.Match[str]]:
    for origin, value in values or ():
        found = pattern.fullmatch(value)
        if found is None:
            raise ValueError(f"{origin}: expected {_FORMS[pattern]}, found {value[:60]!r}")
        yield found


def _unescape(text: str) -> str:
    return _ESCAPE.sub(lambda m: _SPECIAL.get(m[1], m[1]), text)
