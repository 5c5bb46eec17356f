"""Tokens of texts and texts of tokens, as vLLM's clients ask for them."""

from typing import Any

import pytest
from lm_eval.utils import RemoteTokenizer, check_remote_tokenizer_support

from tests.server.conftest import CONTEXT, END, World

TEXT = "Ünïcödé: the sky is blue, 東京."


def test_a_text_becomes_tokens_and_a_text_again(world: World, spelling: Any) -> None:
    answer = world.client.post("/tokenize", json={"model": "tiny", "prompt": TEXT, "return_token_strs": True}).json()
    ids = spelling(TEXT)["input_ids"]
    assert answer == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
        "token_strs": spelling.convert_ids_to_tokens(ids),
    }
    assert world.client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": TEXT}
    plain = world.client.post("/tokenize", json={"prompt": TEXT}).json()
    assert plain["token_strs"] is None


def test_messages_become_the_tokens_of_their_text(world: World, spelling: Any) -> None:
    body = {"messages": [{"role": "user", "content": "sky?"}], "return_token_strs": False}
    answer = world.client.post("/tokenize", json=body).json()
    assert answer["tokens"] == spelling("user: sky?\nassistant:")["input_ids"]


def test_texts_of_any_length_have_tokens(world: World) -> None:
    assert world.client.post("/tokenize", json={"prompt": ""}).json()["count"] == 0
    long = world.client.post("/tokenize", json={"prompt": "a b " * 10 * CONTEXT}).json()
    assert long["count"] > CONTEXT
    assert world.client.post("/detokenize", json={"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 422, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 422, "prompt"),
        ("/tokenize", {"prompt": "\ud800"}, 422, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt-4"}, 404, "model"),
        ("/tokenize", {"prompt": "a", "add_special_tokns": True}, 422, "add_special_tokns"),
        ("/detokenize", {"tokens": [5, 100_000]}, 422, "tokens.1"),
        ("/detokenize", {"tokens": [-1]}, 422, "tokens.0"),
        ("/detokenize", {"tokens": [5], "model": "demo@9"}, 404, "model"),
        ("/detokenize", {"tokens": [5], "model": "demo@"}, 404, "model"),
    ],
)
def test_what_is_wrong_is_named(world: World, path: str, body: Any, status: int, param: str) -> None:
    import json

    response = world.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    if status == 404:
        assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["tiny", "demo", "demo@1", "other@1"])
def test_every_model_has_the_same_tokenizer(world: World, name: str) -> None:
    assert world.client.post("/tokenize", json={"prompt": "a", "model": name}).status_code == 200


def test_the_evaluation_harness_needs_no_tokenizer_of_its_own(address: str, spelling: Any) -> None:
    assert check_remote_tokenizer_support(f"{address}/v1/completions")
    remote = RemoteTokenizer(f"{address}/v1/completions")
    assert remote.encode(TEXT) == spelling(TEXT)["input_ids"]
    assert remote.decode(remote.encode(TEXT)) == TEXT
    assert (remote.eos_token, remote.pad_token, remote.bos_token) == (END, END, None)
    assert remote.eos_token_id == spelling.eos_token_id
    chat = [{"role": "user", "content": "sky?"}]
    assert remote.apply_chat_template(chat) == spelling.apply_chat_template(chat, tokenize=False)
