"""A conversation becomes text through its model's template, in the form that it reads, and nothing of it is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering.chat_template import ChatTemplate, open_chat_template, read_chat_template
from steering.errors import ChatTemplateError, ConversationError
from tests.chat_templates import EITHER, FIRST_PART, NEITHER, PARTS, STRINGS, TOOLS, user
from tests.training.helpers import make_tokenizer

TWO = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]


@pytest.fixture(scope="module")
def template() -> Callable[[str], ChatTemplate]:
    def made(source: str) -> ChatTemplate:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = source
        return ChatTemplate(tokenizer)

    return made


Made = Callable[[str], ChatTemplate]


@pytest.mark.parametrize(
    ("source", "string", "parts"),
    [
        (STRINGS, "[user]sky[answer]", "[user]onetwo[answer]"),
        (PARTS, "[user]sky;", "[user]one;two;"),
        (EITHER, "[user]sky", "[user]one|two|"),
        (FIRST_PART, "[user]sky", "[user]onetwo"),
    ],
)
def test_a_template_gets_the_form_that_it_reads(template: Made, source: str, string: str, parts: str) -> None:
    made = template(source)
    assert made.problem is None
    assert made.render(user("sky")) == string
    assert made.render(user(TWO)) == parts


def test_each_role_has_its_own_form(template: Made) -> None:
    mixed = (
        "{% for m in messages %}{% if m.role == 'system' %}S:{{ m.content.strip() }} {% else %}U:"
        "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    turns = [{"role": "system", "content": TWO}, *user("sky")]
    assert template(mixed).render(turns) == "S:onetwo U:sky"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (NEITHER, "neither from a string nor from a list of parts"),
        ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError, line 1"),
        ("{{ missing() }}", "'missing' is undefined"),
        ("{{ messages[0].content.upper.nothing.there }}", "UndefinedError"),
        ("a text without messages", "neither"),
    ],
)
def test_a_template_that_shows_no_message_is_at_fault_itself(template: Made, source: str, why: str) -> None:
    made = template(source)
    assert made.problem is not None
    assert why in made.problem
    with pytest.raises(ChatTemplateError, match="cannot be used"):
        made.render(user("sky"))


def test_a_template_may_want_a_system_message_first(template: Made) -> None:
    strict = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + PARTS
    made = template(strict)
    assert made.problem is None
    assert made.render([{"role": "system", "content": "be"}, *user("sky")]) == "[system]be;[user]sky;"
    with pytest.raises(ConversationError, match="refuses these messages: system first"):
        made.render(user("sky"))


def test_an_error_of_the_template_is_the_messages_only_where_plain_turns_work(template: Made) -> None:
    made = template(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ broken() }}{% endif %}{{ m.content }}"
        "{% for t in m.tool_calls %}{{ t.function.arguments | items | list | length + t.function.name }}{% endfor %}"
        "{% endfor %}"
    )
    assert made.problem is None
    with pytest.raises(ChatTemplateError, match="these roles \\(user, tool\\): UndefinedError"):
        made.render([*user("a"), {"role": "tool", "content": "b", "tool_call_id": "1"}])
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(ConversationError, match="cannot show these messages"):
        made.render([*user("a"), {"role": "assistant", "tool_calls": [call]}])


def test_what_a_template_leaves_out_is_refused_by_name(template: Made) -> None:
    made = template(
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert made.dropped == ("system", "tool")
    for role in ("system", "developer", "tool"):
        with pytest.raises(ConversationError, match=f"leaves out what turns of role '{role}' say") as failure:
            made.render([{"role": role, "content": "b"}, *user("a")])
        assert failure.value.field == "messages.0.role"
    assert made.render([{"role": "system", "content": ""}, *user("a")]) == "a"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    with pytest.raises(ConversationError) as failure:
        made.render([*user("a"), {"role": "assistant", "tool_calls": [call]}])
    assert failure.value.field == "messages.1.tool_calls"


@pytest.mark.parametrize(
    ("writes", "shown"),
    [
        ("{{ t.function.arguments }}", '{"x": "a\\"b"}'),
        ("{{ t.function.arguments | tojson }}", '{"x": "a\\"b"}'),
        ("{% for k, v in t.function.arguments | items %}{{ k }}={{ v }}{% endfor %}", 'x=a"b'),
        (
            "{% if t.function.arguments is string %}{{ t.function.arguments }}{% else %}"
            "{{ t.function.arguments | tojson }}{% endif %}",
            '{"x": "a\\"b"}',
        ),
    ],
)
def test_calls_of_tools_and_their_answers_reach_the_template(template: Made, writes: str, shown: str) -> None:
    made = template(TOOLS.replace("ARGUMENTS", writes))
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": '{"x": "a\\"b"}'}}
    turns = [
        *user("sky?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "blue", "tool_call_id": "call_1"},
    ]
    text = made.render(turns)
    assert text == f"[user]sky?[assistant]<call_1 look {shown}>[tool call_1]blue"


def test_a_developer_is_one_where_the_template_knows_the_word(template: Made) -> None:
    turns = [{"role": "developer", "content": "be"}, *user("sky")]
    assert template(STRINGS).render(turns) == "[system]be[user]sky[answer]"
    assert template(STRINGS + "{# developer #}").render(turns) == "[developer]be[user]sky[answer]"


def test_variables_of_the_template_are_set_and_others_refused(template: Made) -> None:
    made = template(STRINGS + "{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}")

    def text(**variables: Any) -> str:
        return made.render(user("a"), variables)

    assert text() == "[user]a[answer]<think>"
    assert text(enable_thinking=False) == "[user]a[answer]"
    assert text(other=False, empty=None) == text(), "what is false asks for nothing"
    with pytest.raises(ConversationError, match="'enable_thinkng'; did you mean 'enable_thinking'") as failure:
        text(enable_thinkng=True)
    assert failure.value.field == "chat_template_kwargs.enable_thinkng"
    for name in ("tokenize", "chat_template", "messages", "add_generation_prompt"):
        with pytest.raises(ConversationError, match="may be set"):
            text(**{name: "x"})


def test_an_answer_begins_or_the_last_message_goes_on(template: Made) -> None:
    ended = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}"
    made = template(ended + "{% if add_generation_prompt %}[answer]{% endif %}")
    turns = [*user("sky?"), {"role": "assistant", "content": "It is "}]
    begun = "[user]sky?[end][assistant]It is"
    assert made.render(turns) == f"{begun}[end][answer]"
    assert made.render(turns, add_generation_prompt=False) == f"{begun}[end]"
    assert made.render(turns, continue_final_message=True).rstrip() == begun
    with pytest.raises(ConversationError) as failure:
        made.render([*user("a"), {"role": "assistant"}], continue_final_message=True)
    assert failure.value.field == "continue_final_message"


def test_every_conversation_has_the_variables_of_the_template_unless_it_has_others(template: Made) -> None:
    made = template(STRINGS + "{{ mood }}")
    made.variables = {"mood": "calm"}
    assert made.render(user("a")) == "[user]a[answer]calm"
    assert made.render(user("a"), {"mood": "loud"}) == "[user]a[answer]loud"
    assert made.describe()["kwargs"] == {"mood": "calm"}
    assert made.describe()["sha256"] != template(STRINGS).describe()["sha256"]


def test_there_may_be_no_template() -> None:
    tokenizer = make_tokenizer()
    assert open_chat_template(tokenizer) is None
    tokenizer.chat_template = STRINGS
    opened = open_chat_template(tokenizer)
    assert opened is not None
    assert opened.source == STRINGS


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.jinja").write_bytes("\u00e9".encode("latin-1"))
    with pytest.raises(ChatTemplateError, match=r"latin.jinja' cannot be read: it is not text in UTF-8"):
        read_chat_template(tmp_path / "latin.jinja")
    with pytest.raises(ChatTemplateError, match=r"gone.jinja' cannot be read: No such file"):
        read_chat_template(tmp_path / "gone.jinja")
