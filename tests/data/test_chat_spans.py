"""What is trained on, template by template; what a template may not do."""

from __future__ import annotations

import pytest

from jaxlm.data import chat

PLAIN_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (  # as Llama 3
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TURNS = (  # as Gemma: the assistant is called model
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
INSTRUCTIONS = (  # as Llama 2 and Mistral: roles must alternate, no mark opens the reply
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # earlier turns lose their thoughts: prefixes are no prefixes
    "{% for m in messages %}{{ m.role }}:{% if loop.last %}{{ m.content }}{% else %}"
    "{{ m.content.split('</think>')[-1] }}{% endif %};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "Q1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2"},
    {"role": "assistant", "content": "A2"},
]
SYSTEM = [{"role": "system", "content": "S"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def marked(messages, template, **options) -> str:
    spans = chat.spans(messages, template=template, **SPECIAL, **options)
    assert "".join(s.text for s in spans) == chat.render(messages, template=template, **SPECIAL)
    return "".join(f"⟦{s.text}⟧" if s.trained else s.text for s in spans)


GOLDEN = {
    "built_in": (
        chat.CHATML,
        SYSTEM + CONVERSATION,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧\n",
    ),
    "chatml_without_marks": (
        PLAIN_CHATML,
        SYSTEM + CONVERSATION,
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>\n⟧"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>\n⟧",
    ),
    "headers": (
        HEADERS,
        CONVERSATION,
        "<s><|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦A1<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦A2<|eot_id|>⟧",
    ),
    "turns": (
        TURNS,
        CONVERSATION,
        "<s><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n⟦A1<end_of_turn>\n⟧"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n⟦A2<end_of_turn>\n⟧",
    ),
    "instructions": (INSTRUCTIONS, CONVERSATION, "[INST] Q1 [/INST]⟦ A1</s>⟧[INST] Q2 [/INST]⟦ A2</s>⟧"),
    "two_replies_in_a_row": (
        chat.CHATML,
        [*CONVERSATION[:2], CONVERSATION[1]],
        "<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n",
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(name):
    template, messages, expected = GOLDEN[name]
    assert marked(messages, template) == expected


@pytest.mark.parametrize("template", [chat.CHATML, PLAIN_CHATML], ids=["marks", "prefixes"])
def test_earlier_replies_are_context(template):
    """A prompt that holds a reply, equal even to the last one, trains on the last one alone."""
    messages = [*CONVERSATION[:3], CONVERSATION[1]]
    text = marked(messages, template, first_trained=3)
    assert text.count("A1") == 2
    assert text.count("⟦") == 1
    assert text.index("⟦") > text.index("Q2")
    assert "⟦A1<|im_end|>" in text


def test_the_boundary_is_where_generation_starts():
    for template in (chat.CHATML, PLAIN_CHATML, HEADERS, TURNS, INSTRUCTIONS):
        spans = chat.spans(CONVERSATION[:2], template=template, **SPECIAL)
        first = next(i for i, s in enumerate(spans) if s.trained)
        prompt = chat.render(CONVERSATION[:1], template=template, add_generation_prompt=True, **SPECIAL)
        assert "".join(s.text for s in spans[:first]) == prompt


def test_a_template_that_rewrites_earlier_turns_is_refused():
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "<think>T</think>A"}]
    assert marked(messages, THINKING) == "user:Q;assistant:⟦<think>T</think>A;⟧"
    with pytest.raises(ValueError, match=r"changes earlier turns when turn 1 .*\{% generation %\} blocks"):
        chat.spans(messages + messages, template=THINKING)


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="no assistant message"):
        chat.spans(CONVERSATION[:1])
    with pytest.raises(ValueError, match="no assistant message"):
        chat.spans(CONVERSATION[:3], first_trained=3)
    empty = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    with pytest.raises(ValueError, match="no text to train on"):
        chat.spans(CONVERSATION, template=empty)


def test_loop_controls_tojson_and_blocks():
    """What published templates rely on: break, JSON not escaped for HTML, whitespace around blocks trimmed."""
    template = (
        "{%- for m in messages %}\n    {% if loop.index0 == 1 %}\n        {% break %}\n    {% endif %}\n"
        "{{ m.content }}|{% endfor %}{{ tools | tojson(indent=1) }}{{ strftime_now('%d %b %Y') }}"
    )
    text = chat.render(CONVERSATION, template=template, tools=[{"é": "<b>'"}])
    assert text == 'Q1|[\n {\n  "é": "<b>\'"\n }\n]01 Jan 2026'


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ raise_exception.__globals__.json }}",
    "{{ messages.append(1) }}",
    "{% set _ = messages[0].update({'content': 'other'}) %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_the_sandbox_holds(template):
    messages = [dict(m) for m in CONVERSATION]
    with pytest.raises(ValueError, match="the chat template refused the messages"):
        chat.render(messages, template=template)
    assert messages == CONVERSATION


HIDDEN = ["{{ '{0.__class__}'.format(messages) }}", "{{ strftime_now.__self__.__class__ }}"]


@pytest.mark.parametrize("template", HIDDEN)
def test_what_the_sandbox_hides_is_empty(template):
    assert chat.render(CONVERSATION, template=template) == ""


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{% if %}", CONVERSATION, "chat template, line 1"),
        (INSTRUCTIONS, CONVERSATION[1:], "refused the messages: roles must alternate"),
        (chat.CHATML, [{"role": "user"}], "refused the messages"),
        (chat.CHATML, [{"role": "user", "content": None}], "refused the messages"),
        (chat.CHATML, [{"role": "user", "content": "a\ufdd0b"}], r"U\+FDD0"),
        (chat.CHATML, [{"role": "user", "content": [{"text": "a\ufdd1b"}]}], r"U\+FDD0"),
    ],
)
def test_errors_name_the_cause(template, messages, message):
    with pytest.raises(ValueError, match=message):
        chat.render(messages, template=template, **SPECIAL)
