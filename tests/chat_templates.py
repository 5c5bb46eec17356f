"""Chat templates of each form that there is, for tests of what reads them."""

from typing import Any

STRINGS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }};{% endif %}{% endfor %}{% endfor %}"
)
EITHER = (
    "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}|{% endfor %}{% endif %}{% endfor %}"
)
FIRST_PART = "{% for m in messages %}[{{ m.role }}]{{ m.content[0].text }}{% endfor %}"
NEITHER = "{% for m in messages %}[{{ m.role }}]{{ m.text }}{% endfor %}"
TOOLS = (
    "{% for m in messages %}[{{ m.role }}{% if m.tool_call_id %} {{ m.tool_call_id }}{% endif %}]"
    "{% if m.content %}{{ m.content }}{% endif %}"
    "{% for t in m.tool_calls %}<{{ t.id }} {{ t.function.name }} ARGUMENTS>{% endfor %}{% endfor %}"
)


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
