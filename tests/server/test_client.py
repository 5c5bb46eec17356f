"""The typed client says what plain HTTP says, blocking and not."""

import asyncio
from typing import Any

import httpx
import pytest

from server.bench import _chunks
from server.client import ApiError, AsyncClient, Client
from server.schemas import CompareResponse, GenerateResponse, TokenBody
from tests.server.conftest import World

RULES: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_new_tokens": 12}
ARMS = [{"name": "plain", "attributes": {}}, {"name": "kind", "attributes": {"kind": 2.0}}]


def texts(answer: GenerateResponse | CompareResponse) -> list[str]:
    if isinstance(answer, CompareResponse):
        return [result.text for arm in answer.arms for result in arm.results]
    return [result.text for result in [*answer.results, *(answer.baseline or [])]]


def test_a_line_of_a_stream_ends_where_the_server_ends_it(address: str) -> None:
    """Not at what ends a line of text elsewhere."""
    name = "one\u2028two\x85three\u2029"
    arms = [{"name": name, "attributes": {}}, {"name": "kind"}]

    async def story() -> list[Any]:
        async with AsyncClient(address) as other:
            return [one async for one in other.stream_compare("Q: What", arms, **RULES)]

    async def chunks() -> str:
        async with httpx.AsyncClient(base_url=address, timeout=60) as http:
            body = {"model": "demo", "prompt": name, "echo": True, "max_tokens": 1, "stream": True}
            return "".join([chunk["choices"][0]["text"] async for chunk in _chunks(http, body)])

    with Client(address) as client:
        for told in (list(client.stream_compare("Q: What", arms, **RULES)), asyncio.run(story())):
            assert isinstance(told[-1], CompareResponse)
            assert told[-1].arms[0].name == name
            assert {one.arm for one in told[:-1] if isinstance(one, TokenBody)} == {name, "kind"}
    assert asyncio.run(chunks()).startswith(name)


def test_both_clients_say_what_http_says(world: World, address: str) -> None:
    body = world.post(prompt=["Q: What", "Q: Where"], baseline=True, **RULES)
    expected = [result["text"] for result in body["results"] + body["baseline"]]
    compared = world.client.post("/compare", json={"prompt": "Q: What", "arms": ARMS} | RULES).json()
    arms = [arm["results"][0]["text"] for arm in compared["arms"]]

    with Client(address) as client:
        assert texts(client.generate(["Q: What", "Q: Where"], baseline=True, **RULES)) == expected
        *tokens, whole = client.stream(["Q: What", "Q: Where"], baseline=True, **RULES)
        assert isinstance(whole, GenerateResponse)
        assert texts(whole) == expected
        assert (
            "".join(one.text for one in tokens if isinstance(one, TokenBody) and (one.arm, one.index) == ("steered", 1))
            == expected[1]
        )
        assert texts(client.compare("Q: What", ARMS, **RULES)) == arms
        *_, last = client.stream_compare("Q: What", ARMS, **RULES)
        assert isinstance(last, CompareResponse)
        assert texts(last) == arms
        scored = client.score("Q: What", [" colour", " sky"], attributes={"kind": 1.0})
        chat = client.generate(messages=[{"role": "user", "content": "What?"}], **RULES)

    async def story() -> None:
        async with AsyncClient(address) as other:
            answers = await asyncio.gather(*(other.generate("Q: What", baseline=True, **RULES) for _ in range(4)))
            assert {answer.results[0].text for answer in answers} == {expected[0]}
            told = [one async for one in other.stream("Q: What", **RULES)]
            assert isinstance(told[-1], GenerateResponse)
            assert texts(told[-1]) == expected[:1]
            assert texts(await other.compare("Q: What", ARMS, **RULES)) == arms
            assert [one async for one in other.stream_compare("Q: What", ARMS, **RULES)][-1].arms[1].results[
                0
            ].text == arms[1]  # type: ignore[union-attr]
            again = await other.score("Q: What", [" colour", " sky"], attributes={"kind": 1.0})
            assert [one.logprob for one in again.scores] == pytest.approx([one.logprob for one in scored.scores])
            assert texts(await other.generate(messages=[{"role": "user", "content": "What?"}], **RULES)) == texts(chat)
            assert (await other.ready()).model == "tiny"

    asyncio.run(story())


def test_texts_become_tokens_and_tokens_texts(world: World, address: str) -> None:
    chat = [{"role": "user", "content": "What?"}]
    bodies = ({"prompt": "Q: What", "return_token_strs": True}, {"messages": chat, "add_generation_prompt": False})
    expected = [world.client.post("/tokenize", json=body).json() for body in bodies]
    info = world.client.get("/tokenizer_info").json()

    with Client(address) as client:
        told = [client.tokenize("Q: What", return_token_strs=True), client.tokenize(**bodies[1])]
        assert [one.model_dump() for one in told] == expected
        assert client.detokenize(client.tokenize(" What", add_special_tokens=False).tokens).prompt == " What"
        assert client.tokenizer_info().model_dump() == info

    async def story() -> None:
        async with AsyncClient(address) as other:
            told = [await other.tokenize("Q: What", return_token_strs=True), await other.tokenize(**bodies[1])]
            assert [one.model_dump() for one in told] == expected
            tokens = (await other.tokenize(" What", add_special_tokens=False)).tokens
            assert (await other.detokenize(tokens)).prompt == " What"
            assert (await other.tokenizer_info()).model_dump() == info

    asyncio.run(story())


def test_checkpoints_are_listed_and_changed(fresh: World) -> None:
    client = Client(http=fresh.client)
    assert client.checkpoints().active == "demo@2"
    assert client.activate("other").name == "other"
    assert client.ready().checkpoint == "other@1"
    assert client.load("demo", "1").version == "1"
    assert {one.version for one in client.checkpoint("demo").versions} == {"1", "2"}
    assert client.unload("demo", "1").unloaded == ["demo@1"]
    assert client.unload("demo").unloaded == ["demo@2"]


def test_what_the_server_refuses_is_an_error_with_its_fields(address: str) -> None:
    with Client(address) as client:
        for refused in (
            lambda: client.generate("a", attributes={"nonsense": 1}),
            lambda: list(client.stream("a", attributes={"nonsense": 1})),
        ):
            with pytest.raises(ApiError, match="it has kind") as failure:
                refused()
            error = failure.value
            assert (error.status, error.type, error.param) == (422, "unknown_attribute", "attributes.nonsense")
            assert error.code == "unknown_attribute"
            assert error.request_id is not None

    async def story() -> None:
        async with AsyncClient(address) as other:
            with pytest.raises(ApiError, match="empty"):
                await other.generate("")
            with pytest.raises(ApiError, match="empty"):
                _ = [one async for one in other.stream("")]

    asyncio.run(story())


def test_a_stream_that_breaks_and_a_page_that_is_no_answer_are_errors() -> None:
    error = '{"error": {"type": "not_finite", "message": "no", "param": null, "request_id": "r"}}'
    replies = {
        "broken": httpx.Response(200, text="event: token\n"),
        "failed": httpx.Response(200, text=f"event: error\ndata: {error}\n\n"),
        "proxy": httpx.Response(502, text="<html>Bad gateway</html>"),
    }

    def client(name: str) -> Client:
        transport = httpx.MockTransport(lambda request: replies[name])
        return Client(http=httpx.Client(transport=transport, base_url="http://test"), api_key="sesame")

    for name, kind in (("broken", "incomplete"), ("failed", "not_finite"), ("proxy", "unknown")):
        with pytest.raises(ApiError) as failure:
            list(client(name).stream("a"))
        assert failure.value.type == kind
    with pytest.raises(httpx.ConnectError):
        Client("http://127.0.0.1:9").generate("a")
