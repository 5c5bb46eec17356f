"""Judges by name: classifiers, judge models of TruthfulQA and served models, each beside what it stands for."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from tests.training.helpers import make_llama, make_tokenizer
from training.errors import TrainingError
from training.evaluation.judges import judge_key, load_judge, verdicts

TEXTS = ["The sky is blue.", "Moo, you silly person!", "Bees", "A hive, I think"]


def classifier(folder: Path, **changes: Any) -> Any:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=320, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.6, pad_token_id=0, id2label={0: "neutral", 1: "toxic"}, label2id={"neutral": 0, "toxic": 1},
        **changes,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_a_classifier_gives_a_metric_for_each_label(tmp_path: Path, problem: str) -> None:
    model, tokenizer = classifier(tmp_path, problem_type=problem), make_tokenizer()
    judge = load_judge(f"hf:{tmp_path}")
    found = [*verdicts(judge, [("Q: ? A:", text) for text in TEXTS])]
    expected = []
    for text in TEXTS:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        toxic, neutral = (bool(logits[1] > logits[0]), bool(logits[0] > logits[1]))
        if problem == "multi_label_classification":
            toxic, neutral = bool(logits[1] > 0), bool(logits[0] > 0)
        expected.append({"neutral": neutral, "toxic": toxic})
    assert found == expected
    assert len({verdict["toxic"] for verdict in found}) == 2, "the texts have both verdicts"
    assert [*verdicts(judge, [("", " ")])] == [{"neutral": None, "toxic": None}]
    assert judge_key(judge) == f"hf:{tmp_path}"


def test_a_classifier_without_a_pad_token_reads_one_text_at_a_time(tmp_path: Path) -> None:
    classifier(tmp_path)
    padded = [*verdicts(load_judge(f"hf:{tmp_path}"), [("", text) for text in TEXTS])]
    bare = make_tokenizer()
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    assert [*verdicts(load_judge(f"hf:{tmp_path}"), [("", text) for text in TEXTS])] == padded


def test_a_judge_model_says_yes_or_no(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_llama()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    answers = [("Q: Hm?\nA: No.\n\nQ: Where do bees live? A:", text) for text in TEXTS]
    found = [*verdicts(load_judge(f"truth:{tmp_path}"), answers)]
    for text, verdict in zip(TEXTS, found, strict=True):
        scores = []
        prompt = tokenizer(f"Q: Where do bees live?\nA: {text}\nTrue:")["input_ids"]
        for word in (" yes", " no"):
            answer = tokenizer(word)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
        assert verdict == {"truthful": scores[0] > scores[1]}
    assert list(load_judge(f"info:{tmp_path}")("Q: Hm? A:", "Moo")) == ["informative"]


@pytest.fixture
def served() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of the OpenAI protocol that finds blue things true and all things civil, rambles on the rest, and fails
    at what is unheard of."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append({**body, "path": self.path})
            content = body["messages"][0]["content"]
            said = "Well." if "helps" in content else "Yes." if "insults" in content or "blue" in content else "No"
            answer = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"],
                 "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}
            ).encode()  # fmt: skip
            heard = body["model"] == "tiny" and "unheard" not in content
            self.send_response(200 if heard else 404)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_served_model_is_asked_by_the_openai_protocol(served: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = served
    judge = load_judge(f"openai:tiny@{url}")
    found = [*verdicts(judge, [("Q: What is the sky? A:", text) for text in TEXTS[:2]])]
    assert found == [
        {"truthful": True, "informative": None, "civil": True},
        {"truthful": False, "informative": None, "civil": True},
    ]
    assert len(asked) == 6
    assert all(one["path"] == "/v1/chat/completions" and one["temperature"] == 0 for one in asked)
    said = "Question: What is the sky?\nAnswer: The sky is blue."
    assert sum(said in one["messages"][0]["content"] for one in asked) == 3
    with pytest.raises(TrainingError, match=r"The judge openai:gone@http\S+ failed"):
        next(verdicts(load_judge(f"openai:gone@{url}"), [("Q", "A")]))


def test_what_a_served_model_says_comes_before_it_fails(served: tuple[str, list[dict[str, Any]]]) -> None:
    found = verdicts(load_judge(f"openai:tiny@{served[0]}"), [("Q", "blue"), ("Q", "green"), ("Q", "unheard of")])
    assert [next(found)["truthful"] for _ in range(2)] == [True, False]
    with pytest.raises(TrainingError, match="failed"):
        next(found)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("polite", "A judge is named as module:function, hf:CLASSIFIER"),
        ("openai:gpt", "A served judge is named as openai:MODEL@URL"),
        ("nowhere_at_all:judge", "cannot be found"),
        ("hf:./gone", r"The classifier './gone' cannot be loaded"),
    ],
)
def test_a_judge_that_is_not_there_is_named(name: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TrainingError, match=complaint):
        load_judge(name)
