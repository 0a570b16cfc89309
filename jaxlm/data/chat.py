"""Chat templates (Jinja, sandboxed) and the completion mask, which is made here and nowhere else.

What is trained on is what the assistant says, with the marks that end its turn. A template says so itself with
`{% generation %}` blocks; for one that has none, the spans come from rendering growing prefixes of the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

# The usual form of open chat models, with the assistant's part marked.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What `strftime_now` tells a template: a run must not depend on the day on which it was started.
DATE = datetime(2026, 1, 1)
# Noncharacters: no valid text holds them, so they can mark spans inside the rendered string.
_START, _STOP = "\ufdd0", "\ufdd1"


class Span(NamedTuple):
    """A stretch of rendered text, and whether it is trained on."""

    text: str
    trained: bool


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012  (the attribute that Jinja reads)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_STOP}"


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = DATE.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, which templates do not expect.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _render(messages: Sequence[Mapping[str, Any]], template: str, **variables: Any) -> str:
    compiled = _compile(template)
    if any(mark in text for text in _strings([*messages, variables]) for mark in (_START, _STOP)):
        raise ValueError("a message holds the noncharacter U+FDD0 or U+FDD1, which marks spans here: remove it")
    try:
        return compiled.render(messages=list(messages), **variables)
    except Exception as error:  # a template is someone else's program: it can fail in any way
        raise ValueError(f"the chat template refused the messages: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def render(
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str = CHATML,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text. variables: what the template reads besides messages (bos_token, tools, …).

    Templates that ask for the date (`strftime_now`) get DATE, always. ValueError if the template is broken, refuses the
    messages, or tries to leave the sandbox.

    >>> render([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    '<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n'
    """
    text = _render(messages, template, add_generation_prompt=add_generation_prompt, **variables)
    return text.replace(_START, "").replace(_STOP, "")


def spans(
    messages: Sequence[Mapping[str, Any]], *, template: str = CHATML, first_trained: int = 0, **variables: Any
) -> list[Span]:
    """The conversation as stretches of text, trained on or not; joined, they are what `render` gives.

    Tokenise each stretch by itself: the boundary before a reply is then exactly where generation starts from.
    first_trained: assistant messages before this index are context, not trained on. Raises ValueError if there is no
    assistant message to train on, or if the template rewrites earlier turns (its prefixes are not prefixes).

    >>> messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    >>> [s.text for s in spans(messages) if s.trained]
    ['Ho<|im_end|>']
    """
    speaking = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= first_trained]
    if not speaking:
        raise ValueError("no assistant message to train on")
    full = _render(messages, template, add_generation_prompt=False, **variables)
    if _START in full:
        context = _render(messages[:first_trained], template, **variables) if first_trained else ""
        return _marked_spans(full, context.count(_START))
    bounds: list[tuple[int, int]] = []
    for i in speaking:
        before = _render(messages[:i], template, add_generation_prompt=True, **variables)
        after = _render(messages[: i + 1], template, add_generation_prompt=False, **variables)
        behind = bounds[-1][1] if bounds else 0
        if not (after.startswith(before) and full.startswith(after) and behind <= len(before)):
            raise ValueError(
                f"the chat template changes earlier turns when turn {i} is added, so the reply cannot be located: use "
                "a template with {% generation %} blocks"
            )
        bounds.append((len(before), len(after)))
    return _cut(full, bounds)


def _marked_spans(marked: str, skip: int) -> list[Span]:
    pieces = marked.split(_START)
    found = [Span(pieces[0], False)]
    for n, piece in enumerate(pieces[1:]):
        inside, _, outside = piece.partition(_STOP)
        found += [Span(inside, n >= skip), Span(outside, False)]
    if not any(s.trained and s.text for s in found):
        raise ValueError("the template's {% generation %} blocks hold no text to train on")
    return [s for s in found if s.text]


def _cut(text: str, bounds: Sequence[tuple[int, int]]) -> list[Span]:
    found, at = [], 0
    for start, stop in bounds:
        found += [Span(text[at:start], False), Span(text[start:stop], True)]
        at = stop
    return [s for s in [*found, Span(text[at:], False)] if s.text]
