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

    A row with `messages` is a conversation; one with `prompt` and `completion` (strings, or message lists) is an
    example; any other must have `text_field`. completion_only: of examples and conversations, only what the assistant
    says is to be predicted; otherwise everything is. template None: the tokenizer's own, or ChatML.
    """

    tokenizer: Tokenizer
    text_field: str = "text"
    completion_only: bool = True
    template: str | None = None

    def __call__(self, row: Mapping[str, Any], origin: str) -> Document:
        """The row as a document; raises BadRow, naming the place, for what cannot be used."""
        if "messages" in row:
            return self._conversation(_messages(row, "messages", origin), 0, origin)
        if "prompt" in row and "completion" in row:
            if isinstance(row["prompt"], str):
                return self._example(_text(row, "prompt", origin, empty=True), _text(row, "completion", origin), origin)
            prompt = _messages(row, "prompt", origin)
            return self._conversation([*prompt, *_messages(row, "completion", origin)], len(prompt), origin)
        return self.text(_text(row, self.text_field, origin), origin)

    def text(self, text: str, origin: str) -> Document:
        """begin + tokens + end; everything but the begin token is predicted."""
        return self._join([(self.tokenizer.encode(text), True)], origin, end=True)

    def _example(self, prompt: str, completion: str, origin: str) -> Document:
        # Each side is tokenised by itself and joined as ids: the boundary is where generation will start from.
        pieces = [(self.tokenizer.encode(prompt), not self.completion_only), (self.tokenizer.encode(completion), True)]
        return self._join(pieces, origin, end=True)

    def _conversation(self, messages: Sequence[Mapping[str, Any]], first: int, origin: str) -> Document:
        template = self.template or self.tokenizer.chat_template or chat.CHATML
        try:
            spans = chat.spans(messages, template=template, first_trained=first, **self._special_tokens())
        except ValueError as error:
            raise BadRow(origin, "conversation", str(error)) from error
        pieces = [(self.tokenizer.encode(s.text), s.trained or not self.completion_only) for s in spans]
        return self._join(pieces, origin, end=False)

    def _special_tokens(self) -> dict[str, str]:
        name = getattr(self.tokenizer, "special_token", lambda _: "")
        return {"bos_token": name("bos"), "eos_token": name("eos")}

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


def _text(row: Mapping[str, Any], field: str, origin: str, *, empty: bool = False) -> str:
    if field not in row:
        raise BadRow(origin, "missing field", f"expected {field!r}, found {', '.join(map(repr, sorted(row))) or 'nothing'}")
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
    if not isinstance(messages, list | tuple) or not messages:
        raise BadRow(origin, "wrong type", f"expected {field!r} to be a list of messages, found {type(messages).__name__}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRow(origin, "wrong type", f"message {i} of {field!r} needs a text field 'role'")
        if message["role"] == "assistant" and "content" in message:
            _text(message, "content", origin, empty=True)
    return list(messages)
