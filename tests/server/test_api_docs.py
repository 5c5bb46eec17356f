"""docs/api.md says what the server does."""

from server.api_docs import PATH, page


def test_the_page_is_what_the_code_makes_of_it() -> None:
    assert PATH.read_text(encoding="utf-8") == page(), "run `make api-docs`"


def test_it_tells_of_every_route_and_field() -> None:
    told = page()
    for route in ("POST /generate", "POST /v1/chat/completions", "DELETE /checkpoints/{name}", "GET /metrics"):
        assert f"## {route}" in told
    for name in ("GenerateRequest", "ArmRequest", "ChatMessage", "ResultBody", "SteeringBody"):
        assert f"### {name}\n" in told
    assert "| `temperature` | number | `1.0` | 0 is greedy (0 to 100) |" in told
