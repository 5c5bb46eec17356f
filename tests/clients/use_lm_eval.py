"""lm-eval: local-completions with the server's tokenizer, and local-chat-completions, on tasks of four questions."""

import json
import os
from pathlib import Path

import requests
from checks import BASE, LONG, STEERED, V1, check, differ, not_possible, raises, run, said, same

os.environ["HF_HUB_OFFLINE"] = "1"  # before its libraries read it: the tasks' data lie beside them

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

TASKS = TaskManager(include_path=str(Path(__file__).parent / "lm_eval"))


def evaluate(task: str, model: str, max_length: int = 2048, **options) -> dict:
    """Results and samples. `max_length`: the harness's own default."""
    kind, path = (
        ("local-chat-completions", "chat/completions") if "chat" in task else ("local-completions", "completions")
    )
    arguments = {"model": model, "base_url": f"{V1}/{path}", "max_retries": 1, "max_length": max_length}
    return simple_evaluate(
        kind,
        arguments,
        [task],
        task_manager=TASKS,
        apply_chat_template="chat" in task,
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )


def answers(model: str, **options) -> list[tuple[list, str]]:
    """Each question's messages, and the answer."""
    samples = evaluate("capitals_chat", model, **options)["samples"]["capitals_chat"]
    return [(json.loads(sample["arguments"][0][0][0]), sample["resps"][0][0]) for sample in samples]


def heard(messages: list, model: str, **fields) -> str:
    return said(messages, model, **{"temperature": 0, "seed": 1234, "stop": ["\n"]} | fields)


@check("chat")
def chat() -> None:
    found = answers(STEERED)
    same(len(found), 4)
    for messages, answer in found:
        same(answer, heard(messages, STEERED))


@check("turns")
def turns() -> None:
    for messages, answer in answers(BASE, num_fewshot=2, fewshot_as_multiturn=True):
        same([message["role"] for message in messages], ["user", "assistant"] * 2 + ["user"])
        same(answer, heard(messages, BASE))


@check("stop")
def stop() -> None:
    for messages, answer in answers(STEERED, gen_kwargs={"until": ["capital"]}):
        same(answer, heard(messages, STEERED, stop=["capital"]))
        differ(answer, heard(messages, STEERED))


@check("steering")
def steering() -> None:
    found = {model: evaluate("capitals", model) for model in (BASE, STEERED)}
    same(found[STEERED]["results"]["capitals"]["acc,none"], 1.0)
    base, steered = (
        [sample["filtered_resps"] for sample in one["samples"]["capitals"]] for one in (found[BASE], found[STEERED])
    )
    differ(base, steered)  # log-likelihoods


@check("wrong model")
def wrong_model() -> None:
    for task in ("capitals", "capitals_chat"):
        with raises(requests.HTTPError, "404"):
            evaluate(task, "nope")


@check("too long")
def too_long() -> None:
    for task in ("capitals", "capitals_chat"):
        with raises(requests.HTTPError, "400"):
            evaluate(task, BASE, system_instruction=LONG)


@check("contexts cut to max_length")
def shortened() -> None:
    found = evaluate("capitals", BASE, 512, system_instruction=LONG)
    same(len(found["samples"]["capitals"]), 4)


not_possible("stream", "it waits for whole answers")
not_possible("usage", "it does not read the counts")

run()
