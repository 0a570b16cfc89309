"""Preference data: a row of a source as a pair of responses to one prompt, or as one response with a label.

Shapes that are understood, each field's name a setting of its source:

    {prompt, chosen, rejected}      strings, or message lists (the replies alone)
    {chosen, rejected}              whole conversations: strings, which share all up to the last reply_marker (as in
                                    hh-rlhf), or message lists, which share their first messages
    {prompt, completion, label}     one response; label true if it is desirable

Prompt and completion are tokenised once each and joined as ids, like any example's; only completions are predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data.document import Document
from jaxlm.data.encode import text_of
from jaxlm.data.errors import BadRow
from jaxlm.data.sources import SourceConfig

Encode = Callable[[Mapping[str, Any], str], Document]
"""(row, origin) -> document: `jaxlm.data.encode.Encoder`."""


def encode_pair(encode: Encode, row: Mapping[str, Any], origin: str, fields: SourceConfig) -> tuple[Document, Document]:
    """The chosen and the rejected response as documents; BadRow, naming the place, for what is not a pair."""
    prompt, chosen, rejected = (list(x) if isinstance(x, tuple) else x for x in _split(row, origin, fields))
    if not isinstance(chosen, type(prompt)) or not isinstance(rejected, type(prompt)):
        kinds = ", ".join(type(x).__name__ for x in (prompt, chosen, rejected))
        raise BadRow(origin, "wrong type", f"expected prompt, chosen and rejected of one kind, found {kinds}")

    def response(reply: Any, which: str) -> Document:
        if isinstance(reply, str):
            text_of({which: reply}, origin, field=which)  # so that a message names the side
        elif not reply:
            raise BadRow(origin, "empty", f"{which!r} has no messages")
        example = {fields.prompt_field: prompt, fields.completion_field: reply, "tools": row.get("tools")}
        return encode(example, origin)._replace(origin=f"{origin} {which}")

    return response(chosen, "chosen"), response(rejected, "rejected")


def _split(row: Mapping[str, Any], origin: str, fields: SourceConfig) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected reply, each text or a list of messages."""
    for name in (fields.chosen_field, fields.rejected_field):
        if name not in row:
            raise BadRow(origin, "missing field", f"expected {name!r}, found {', '.join(map(repr, sorted(row)))}")
    chosen, rejected = row[fields.chosen_field], row[fields.rejected_field]
    if row.get(fields.prompt_field) is not None:
        return row[fields.prompt_field], chosen, rejected
    if isinstance(chosen, str):
        texts = [text_of(row, origin, field=name) for name in (fields.chosen_field, fields.rejected_field)]
        return _split_texts(texts, fields.reply_marker, origin)
    return _split_messages(chosen, rejected, origin)


def _split_texts(texts: Sequence[str], marker: str, origin: str) -> tuple[str, str, str]:
    starts = [text.rfind(marker) + len(marker) for text in texts]
    if any(marker not in text for text in texts):
        raise BadRow(origin, "no reply", f"expected {marker!r} before the last reply (or set reply_marker)")
    prompts = [text[:start] for text, start in zip(texts, starts)]
    if prompts[0] != prompts[1]:
        raise BadRow(origin, "different prompts", f"chosen and rejected differ before their last {marker!r}")
    return prompts[0], *(text[start:] for text, start in zip(texts, starts))  # type: ignore[return-value]


def _split_messages(chosen: Any, rejected: Any, origin: str) -> tuple[Any, Any, Any]:
    if not all(isinstance(messages, list | tuple) for messages in (chosen, rejected)):
        kinds = " and ".join(type(x).__name__ for x in (chosen, rejected))
        raise BadRow(origin, "wrong type", f"expected text or lists of messages as chosen and rejected, found {kinds}")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise BadRow(origin, "different prompts", "chosen and rejected share no first message")
    speakers = [m[shared].get("role") if isinstance(m[shared], Mapping) else None for m in (chosen, rejected)]
    if speakers != ["assistant", "assistant"]:
        raise BadRow(origin, "different prompts", f"expected the first difference in the replies, found {speakers}")
    return list(chosen[:shared]), list(chosen[shared:]), list(rejected[shared:])


def encode_response(encode: Encode, row: Mapping[str, Any], origin: str, fields: SourceConfig) -> Document:
    """One response as a document with its label; BadRow, naming the place, if the label is not true or false."""
    label = row.get(fields.label_field)
    if label not in (True, False, 0, 1):  # 0 and 1 are how some writers put it
        found = f"{label!r:.40}" if fields.label_field in row else "none"
        raise BadRow(origin, "wrong label", f"expected {fields.label_field!r} to be true or false, found {found}")
    return encode(row, origin)._replace(label=bool(label))


def with_mismatched(responses: Sequence[Document]) -> list[tuple[Document, Document]]:
    """Each response, and beside it its prompt with the completion of the next one to another prompt (in a circle).

    What stands between rows is fixed by the data, not by batches, so that KTO's baseline does not depend on them. A
    prompt ends where the first token is predicted. ValueError if all responses have one prompt.
    """
    prompts = [d.tokens[: _prompt_length(d)].tobytes() for d in responses]
    if len(set(prompts)) < 2:
        raise ValueError(
            f"mismatched completions come from rows with another prompt: expected at least 2 prompts, found "
            f"{len(set(prompts))} in {len(responses)} rows"
        )
    # From the end, round the circle once: `other[i]` is the first row after i with another prompt.
    other = list(range(len(responses)))
    for i in (*reversed(range(len(responses))), *reversed(range(len(responses)))):
        after = (i + 1) % len(responses)
        other[i] = after if prompts[after] != prompts[i] else other[after]
    return [(own, _join(own, responses[j])) for own, j in zip(responses, other)]


def _prompt_length(d: Document) -> int:
    return int(np.argmax(d.mask))


def _join(prompt: Document, completion: Document) -> Document:
    stop, start = _prompt_length(prompt), _prompt_length(completion)
    tokens, mask, sizes = (np.concatenate([a[:stop], b[start:]]) for a, b in zip(prompt[:3], completion[:3]))
    return Document(tokens, mask, sizes, f"{prompt.origin} with the completion of {completion.origin}")
