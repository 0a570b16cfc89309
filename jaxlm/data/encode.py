"""From a row of a source to a tokenised document: plain text, prompt and completion, or a conversation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlm.data import chat
from jaxlm.data.document import Document, make_document
from jaxlm.data.errors import BadRow
from jaxlm.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How rows become tokens.

    A row with messages_field is a conversation (its `tools`, if any, go to the template); one with prompt_field and
    completion_field (strings, or message lists) is an example; any other must have text_field. completion_only: of
    examples and conversations, only what the assistant says is to be predicted; otherwise everything is. template
    None: the tokenizer's own, or ChatML.

    >>> from jaxlm.data.tokenizer import ByteTokenizer
    >>> document = Encoder(ByteTokenizer())({"prompt": "1+", "completion": "2"}, "a.jsonl:1")
    >>> document.tokens.tolist(), document.mask.astype(int).tolist()
    ([256, 49, 43, 50, 257], [0, 0, 0, 1, 1])
    """

    tokenizer: Tokenizer
    text_field: str = "text"
    completion_only: bool = True
    template: str | None = None
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    messages_field: str = "messages"

    def __call__(self, row: Mapping[str, Any], origin: str) -> Document:
        """The row as a document; raises BadRow, naming the place, for what cannot be used."""
        if self.messages_field in row:
            return self._conversation(_messages(row, self.messages_field, origin), 0, row, origin)
        if self.prompt_field in row and self.completion_field in row:
            if isinstance(row[self.prompt_field], str):
                prompt_text = text_of(row, origin, field=self.prompt_field, empty=True)
                return self._example(prompt_text, text_of(row, origin, field=self.completion_field), origin)
            prompt = _messages(row, self.prompt_field, origin)
            messages = [*prompt, *_messages(row, self.completion_field, origin)]
            return self._conversation(messages, len(prompt), row, origin)
        return self.text(text_of(row, origin, field=self.text_field), origin)

    def text(self, text: str, origin: str) -> Document:
        """begin + tokens + end; everything but the begin token is predicted."""
        return self._join([(self.tokenizer.encode_plain(text), True)], origin, end=True)

    def _example(self, prompt: str, completion: str, origin: str) -> Document:
        return self._join(self._encode([(prompt, False), (completion, True)]), origin, end=True)

    def _conversation(
        self, messages: Sequence[Mapping[str, Any]], first: int, row: Mapping[str, Any], origin: str
    ) -> Document:
        template = self.template or self.tokenizer.chat_template or chat.CHATML
        variables = {**self.tokenizer.special_tokens, **({"tools": row["tools"]} if row.get("tools") else {})}
        try:
            spans = chat.spans(messages, template=template, first_trained=first, **variables)
        except ValueError as error:
            raise BadRow(origin, "conversation", str(error)) from error
        return self._join(self._encode(spans), origin, end=False)

    def _encode(self, spans: Sequence[tuple[str, bool]]) -> list[tuple[np.ndarray, bool]]:
        # Each side is tokenised by itself and joined as ids: the boundary is where generation will start from.
        spans = [(text, trained) for text, trained in spans if text]
        encoders = [self.tokenizer.encode] + [self.tokenizer.encode_continuation] * (len(spans) - 1)
        return [(e(text), trained or not self.completion_only) for e, (text, trained) in zip(encoders, spans)]

    def _join(self, pieces: Sequence[tuple[np.ndarray, bool]], origin: str, *, end: bool) -> Document:
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_id
        ids, masks = [], []
        starts_itself = any(len(p) for p, _ in pieces) and next(p for p, _ in pieces if len(p))[0] == bos
        if bos is not None and not starts_itself:  # templates often write the begin token themselves
            ids.append(np.array([bos], np.int32))
            masks.append(np.zeros(1, bool))
        for tokens, trained in pieces:
            ids.append(tokens)
            masks.append(np.full(len(tokens), trained))
        if end and eos is not None:
            ids.append(np.array([eos], np.int32))
            masks.append(np.ones(1, bool))
        tokens, mask = np.concatenate(ids), np.concatenate(masks)
        if not mask[1:].any():
            raise BadRow(origin, "nothing to predict", f"{len(tokens)} tokens, none of them a target")
        return make_document(tokens, mask=mask, token_bytes=token_bytes(self.tokenizer), origin=origin)


_BYTES: dict[str, np.ndarray] = {}


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """`tokenizer.token_bytes()`, computed once per tokenizer."""
    name = tokenizer.fingerprint()
    if name not in _BYTES:
        _BYTES[name] = tokenizer.token_bytes()
    return _BYTES[name]


def text_of(row: Mapping[str, Any], origin: str, *, field: str, empty: bool = False) -> str:
    """The row's text in `field`; BadRow if it is missing, not text, empty (unless allowed), or cannot be UTF-8."""
    if field not in row:
        found = ", ".join(map(repr, sorted(row))) or "nothing"
        raise BadRow(origin, "missing field", f"expected {field!r}, found {found}")
    if not isinstance(row[field], str):
        raise BadRow(origin, "wrong type", f"expected {field!r} to be text, found {type(row[field]).__name__}")
    if not row[field] and not empty:
        raise BadRow(origin, "empty", f"{field!r} has no text")
    try:
        row[field].encode()
    except UnicodeEncodeError as error:  # JSON may hold lone surrogates, which no UTF-8 can
        raise BadRow(origin, "broken UTF-8", f"{field!r} holds a lone surrogate at {error.start}") from error
    return row[field]


def _messages(row: Mapping[str, Any], field: str, origin: str) -> list[Mapping[str, Any]]:
    messages = row.get(field)
    if not isinstance(messages, list | tuple):
        found = type(messages).__name__
        raise BadRow(origin, "wrong type", f"expected {field!r} to be a list of messages, found {found}")
    if not messages:
        raise BadRow(origin, "empty", f"{field!r} has no messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(origin, "wrong type", f"message {i} of {field!r} needs a text field 'role'")
        content = message.get("content")
        if isinstance(content, str):
            text_of(message, origin, field="content", empty=True)
        elif not isinstance(content, list) and not (content is None and message.get("tool_calls")):
            # Templates would write out "None", or nothing at all.
            found = f"{content!r:.40}"
            raise BadRow(origin, "wrong type", f"message {i} of {field!r} needs text in 'content', found {found}")
    return list(messages)
