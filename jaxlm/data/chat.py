"""Chat templates (Jinja, sandboxed) and the completion mask, which is made here and nowhere else.

What is trained on is what the assistant says, with the marks that end its turn. A template says so itself with
`{% generation %}` blocks; for one that has none, the spans come from rendering growing prefixes of the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _render(messages: Sequence[Mapping[str, Any]], template: str, **variables: Any) -> str:
    for message in messages:
        if any(c in str(message) for c in (_START, _STOP)):
            raise ValueError("a message holds the noncharacter U+FDD0 or U+FDD1, which marks spans here: remove it")
    try:
        return _compile(template).render(messages=list(messages), **variables)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refused the messages: {error}") from error


def render(
    messages: Sequence[Mapping[str, Any]], *, template: str = CHATML, add_generation_prompt: bool = False, **variables: Any
) -> str:
    """The conversation as text. variables: what the template reads besides messages (bos_token, tools, …).

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

    >>> [s.text for s in spans([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]) if s.trained]
    ['Ho<|im_end|>']
    """
    speaking = [i for i, m in enumerate(messages) if m.get("role") == "assistant" and i >= first_trained]
    if not speaking:
        raise ValueError("no assistant message to train on")
    full = _render(messages, template, add_generation_prompt=False, **variables)
    if _START in full:
        return _marked_spans(full, [m for m in messages if m.get("role") == "assistant"].index(messages[speaking[0]]))
    bounds = []
    for i in speaking:
        before = _render(messages[:i], template, add_generation_prompt=True, **variables)
        after = _render(messages[: i + 1], template, add_generation_prompt=False, **variables)
        if not (after.startswith(before) and full.startswith(after)):
            raise ValueError(
                f"the chat template changes earlier turns when turn {i} is added, so the reply cannot be located: use a "
                "template with {% generation %} blocks"
            )
        bounds.append((len(before), len(after)))
    return _cut(full, bounds)


def _marked_spans(marked: str, skip: int) -> list[Span]:
    pieces = marked.split(_START)
    found = [Span(pieces[0], False)]
    for n, piece in enumerate(pieces[1:]):
        inside, _, outside = piece.partition(_STOP)
        found += [Span(inside, n >= skip), Span(outside, False)]
    return [s for s in found if s.text]


def _cut(text: str, bounds: Sequence[tuple[int, int]]) -> list[Span]:
    found, at = [], 0
    for start, stop in bounds:
        found += [Span(text[at:start], False), Span(text[start:stop], True)]
        at = stop
    return [s for s in [*found, Span(text[at:], False)] if s.text]
