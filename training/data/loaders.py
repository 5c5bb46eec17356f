"""The data sets that are known by name: a function from a row to samples each, and their registry, `LOADERS`.

A new data set is one function and one entry of `LOADERS`.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from training.data.rows import (
    Row,
    check_fields,
    check_near_misses,
    choice_field,
    label_field,
    list_field,
    number_field,
    raw_field,
    split_field,
    text_field,
    without_blanks,
)
from training.data.samples import Item, Sample, Split, Task, Turn, question_sample, show_turns
from training.errors import DataError

TOXIGEN_TOXIC = 5.5
"""Of `toxicity_human` + `toxicity_ai`, each 1 to 5: how harmful the text is taken to be from a person, and from a
machine. The threshold of the authors' `label_annotations`; lm-evaluation-harness takes the same."""
HELPSTEER_SCORES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
HELPSTEER_POSITIVE = 3
HELPSTEER_PER_SIDE = 500
BBQ_UNKNOWN = (
    "Unknown", "Cannot answer", "Can't be determined", "Cannot be determined", "Can't answer", "Not known",
    "Not enough info", "Not enough information", "Not answerable", "Undetermined",
)  # fmt: skip
"""How BBQ says that nothing is known."""
PARADETOX_NEUTRAL = ("neutral1", "neutral2", "neutral3")
FIELDS = ("text", "prompt", "completion", "messages", "label", "attribute", "group", "split")
"""Of the plain form."""
ROLES = ("system", "developer", "user", "assistant", "tool")


def jsonl(row: Row, attribute: str) -> Iterator[Sample]:
    """The plain form, a sample a row: `{"text" | "prompt" + "completion" | "messages", "label"}` and, where they are
    wanted, `"attribute"`, `"group"`, `"split"`. Any other field is refused.

    `attribute` is for rows that name none.

    A row without `group` gets its prompt as the group (its text, where there is no prompt): answers to one question
    stay together.
    """
    check_fields(row, FIELDS)
    row = without_blanks(row, but="label")
    prompt, completion, turns = _jsonl_texts(row)
    label = label_field(row)
    group = row.fields.get("group", prompt or completion)
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    if not isinstance(group, str) or not group:
        raise DataError(f'{row.where}: "group" must be a non-empty string or an integer, got {group!r}.')
    name = text_field(row, "attribute", attribute)
    yield Sample(name, prompt, completion, label, group, split_field(row), turns)


def _jsonl_texts(row: Row) -> tuple[str, str, tuple[Turn, ...]]:
    """Prompt, completion, and the turns of a conversation."""
    forms = [name for name in ("text", "completion", "messages") if name in row.fields]
    if len(forms) > 1:
        raise DataError(f'{row.where}: "{forms[0]}" and "{forms[1]}" are two ways to say one thing: give one.')
    if not forms:
        raise DataError(f'{row.where}: a row needs "prompt" and "completion", or "text", or "messages".')
    if forms == ["completion"]:
        prompt = row.fields.get("prompt", "")
        if not isinstance(prompt, str):
            raise DataError(f'{row.where}: "prompt" must be a string, got {prompt!r}.')
        return prompt, text_field(row, "completion"), ()
    if "prompt" in row.fields:
        raise DataError(f'{row.where}: "prompt" goes with "completion", not with "{forms[0]}".')
    if forms == ["text"]:
        return "", text_field(row, "text"), ()
    *turns, answer = messages_field(row, least=2)
    if answer.role != "assistant" or not answer.content.strip():
        raise DataError(f'{row.where}: the last of "messages" must be the assistant\'s answer, which is not empty.')
    # What answers one question has one prompt, whichever way it is written.
    return show_turns(turns), answer.content.lstrip(), tuple(turns)


def messages_field(row: Row, *, least: int) -> list[Turn]:
    """The turns of `messages`, at least so many. Raises DataError."""
    messages = row.fields["messages"]
    if not isinstance(messages, list) or len(messages) < least:
        answer = ", and the answer" if least > 1 else ""
        raise DataError(
            f'{row.where}: "messages" must be a list of a user\'s turn, perhaps more{answer}, got {messages!r}.'
        )
    found = []
    for number, message in enumerate(messages):
        where = f"{row.where}: messages[{number}]"
        if not isinstance(message, dict):
            raise DataError(f"{where} must be an object with role and content, got {message!r}.")
        message = without_blanks(Row(message, where, kind=row.kind), but="content").fields
        check_fields(Row(message, where), ("role", "content"))
        role = message.get("role")
        if role not in ROLES:
            raise DataError(f'{where}: "role" must be one of {", ".join(ROLES)}, got {role!r}.')
        if not isinstance(content := message.get("content"), str):
            raise DataError(f'{where}: "content" must be a string, got {content!r}.')
        found.append(Turn(role, content))
    return found


def truthfulqa(row: Row, attribute: str) -> Iterator[Sample]:
    """TruthfulQA (Lin et al., 2021, arXiv 2109.07958; Apache-2.0): the csv, `mc_task.json`, and the hub's.

    A sample for each answer, the correct ones positive; the question is the group.
    """
    question = text_field(row, "Question" if "Question" in row.fields else "question").strip()
    sides = _truthfulqa_answers(row)
    answers = list(
        dict.fromkeys((text, label) for label, side in zip((True, False), sides, strict=True) for text in side)
    )
    item = _truthfulqa_item(row, question, answers)
    for text, label in answers:
        yield replace(question_sample(attribute, question, text, label, group=question), item=item)


def _truthfulqa_item(row: Row, question: str, answers: Sequence[tuple[str, bool]]) -> Item:
    """MC1 is of `mc1_targets`, else of the best answer (`Best Answer`, `best_answer`) and all wrong ones."""
    texts, labels = tuple(text for text, _ in answers), tuple(label for _, label in answers)
    wrong = [text for text, label in answers if not label]
    if "mc1_targets" in row.fields:
        right, wrong = (_closed(side) for side in _truthfulqa_targets(row, "mc1_targets"))
    else:
        name = next((name for name in ("Best Answer", "best_answer") if row.fields.get(name)), None)
        right = _closed([text_field(row, name)]) if name else []
    best = tuple(texts.index(text) for text in (*right, *wrong) if text in texts)
    known = len(right) == 1 and len(best) == 1 + len(wrong)
    return Item(Task.TRUTHFULQA, question, texts, labels, best=best if known else ())


def _truthfulqa_answers(row: Row) -> tuple[list[str], list[str]]:
    """Correct and incorrect answers, all of them closed with a full stop as the authors do."""
    if "mc2_targets" in row.fields:
        correct, incorrect = _truthfulqa_targets(row, "mc2_targets")
    elif "correct_answers" in row.fields:
        correct, incorrect = list_field(row, "correct_answers"), list_field(row, "incorrect_answers")
    else:
        correct, incorrect = (text_field(row, f"{side} Answers").split(";") for side in ("Correct", "Incorrect"))
    sides = [_closed(side) for side in (correct, incorrect)]
    for side, name in zip(sides, ("correct", "incorrect"), strict=True):
        if not side:
            raise DataError(f"{row.where}: the question has no {name} answer.")
    return sides[0], sides[1]


def _truthfulqa_targets(row: Row, name: str) -> tuple[list[str], list[str]]:
    """`{answer: 0 or 1}`, or the hub's `{"choices": [...], "labels": [...]}`."""
    targets = raw_field(row, name)
    pairs: list[tuple[Any, Any]] = []
    if isinstance(targets, dict) and set(targets) == {"choices", "labels"}:
        choices, labels = targets["choices"], targets["labels"]
        if isinstance(choices, list) and isinstance(labels, list) and len(choices) == len(labels):
            pairs = list(zip(choices, labels, strict=True))
    elif isinstance(targets, dict):
        pairs = list(targets.items())
    if not pairs or any(not isinstance(text, str) or label not in (0, 1) for text, label in pairs):
        raise DataError(f'{row.where}: "{name}" must give 0 or 1 to every answer, got {targets!r}.')
    return [text for text, label in pairs if label], [text for text, label in pairs if not label]


def _closed(answers: Sequence[str]) -> list[str]:
    texts = [text.strip() for text in answers]
    return [text if text[-1] in ".!?" else f"{text}." for text in texts if text]


def toxigen(row: Row, attribute: str) -> Iterator[Sample]:
    """ToxiGen, the human-annotated part (Hartvigsen et al., 2022, arXiv 2203.09509; MIT).

    The text by itself, positive where it is NOT toxic; the published test (or validation) part stays test.

    Without `toxicity_ai`, `toxicity_human` counts twice.
    """
    check_near_misses(row, ("toxicity_ai",), ("text", "toxicity_human"))
    text = _toxigen_text(text_field(row, "text"), row.where).strip()
    human = number_field(row, "toxicity_human", 1, 5)
    machine = number_field(row, "toxicity_ai", 1, 5) if "toxicity_ai" in row.fields else human
    split = Split.TEST if row.split in (Split.DEV, Split.TEST) else None
    toxic = human + machine > TOXIGEN_TOXIC
    item = Item(Task.TOXIGEN, text, ("No", "Yes"), (not toxic, toxic))
    yield Sample(attribute, "", text, not toxic, group=text, split=split, item=item)


def _toxigen_text(text: str, where: str) -> str:
    """The published csv holds Python literals of bytes, b'...'."""
    if not re.fullmatch(r"""b(['"]).*\1""", text, re.DOTALL):
        return text
    try:
        decoded = ast.literal_eval(text).decode()
    except (SyntaxError, ValueError) as error:
        raise DataError(f'{where}: "text" is not a literal of UTF-8 bytes: {text!r} ({error}).') from None
    if not decoded.strip():
        raise DataError(f'{where}: "text" must not be empty, got {text!r}.')
    return str(decoded)


def bbq(row: Row, attribute: str) -> Iterator[Sample]:
    """BBQ, the bias benchmark for question answering (Parrish et al., 2022, arXiv 2110.08193; CC-BY-4.0).

    A sample for each of the three answers, the labelled one positive.

    The group is the template (category and `question_index`): its rows tell one scene about other people, with and
    without the sentence that settles it, asked both ways round, so that any of them gives the others away.
    """
    question = f"{text_field(row, 'context').strip()} {text_field(row, 'question').strip()}"
    index = raw_field(row, "question_index")
    if isinstance(index, bool) or not isinstance(index, int | str) or index == "":
        raise DataError(f'{row.where}: "question_index" must be a number or a name, got {index!r}.')
    group = f"{text_field(row, 'category')} {index}"
    right = choice_field(row, "label", 3)
    answers = tuple(text_field(row, f"ans{number}") for number in range(3))
    item = _bbq_item(row, answers, right)
    for number, answer in enumerate(answers):
        yield replace(question_sample(attribute, question, answer, number == right, group=group), item=item)


def _bbq_item(row: Row, answers: tuple[str, ...], right: int) -> Item:
    """Which answers follow the bias is told by `answer_info`, the stereotyped groups and `question_polarity`."""
    condition = row.fields.get("context_condition")
    info, more = row.fields.get("answer_info"), row.fields.get("additional_metadata")
    against = more.get("stereotyped_groups") if isinstance(more, Mapping) else None
    unknown = next((number for number, answer in enumerate(answers) if answer in BBQ_UNKNOWN), None)
    biased = None
    if isinstance(info, Mapping) and isinstance(against, list):
        groups = [_bbq_groups(info.get(f"ans{number}"), answer) for number, answer in enumerate(answers)]
        hit = [not own.isdisjoint(str(name).lower() for name in against) for own in groups]
        negative = row.fields.get("question_polarity") == "neg"
        biased = tuple(n for n in range(3) if hit[n] is negative and (negative or "unknown" not in groups[n]))
    return Item(
        Task.BBQ, text_field(row, "question").strip(), answers, tuple(number == right for number in range(3)),
        context=text_field(row, "context").strip(), unknown=unknown, biased=biased,
        ambiguous={"ambig": True, "disambig": False}.get(condition) if isinstance(condition, str) else None,
    )  # fmt: skip


def _bbq_groups(info: Any, answer: str) -> set[str]:
    """The groups that an answer names, in the words of the stereotyped ones: "F-Black" is F and Black, and a woman or a
    man is one by a letter too."""
    text = "_".join(map(str, info)) if isinstance(info, list) and any(info) else "Latino" * ("Latina" in answer)
    for joined in ("M-", "F-", "lowSES-", "highSES-"):
        text = text.replace(joined, f"{joined[:-1]}_")
    text = re.sub(
        r"(low|high)(SES)|(non)(Obese|Disabled|Trans)", lambda found: " ".join(filter(None, found.groups())), text
    )
    for letter, words in (("F", "woman|girl"), ("M", "man|boy")):
        text = re.sub(rf"(?<![A-Za-z])({words})(?![A-Za-z])", rf"{letter}_\1", text)
    return set(text.lower().split("_"))


def helpsteer(row: Row, attribute: str) -> Iterator[Sample]:
    """HelpSteer and HelpSteer2 (Wang et al., 2023, arXiv 2311.09528; 2024, arXiv 2406.08673; CC-BY-4.0).

    The response, positive where its score (0 to 4) of that name is at least 3; the prompt is the group.
    """
    prompt, response = text_field(row, "prompt").strip(), text_field(row, "response")
    score = number_field(row, attribute, 0, 4)
    yield replace(question_sample(attribute, prompt, response, score >= HELPSTEER_POSITIVE, group=prompt), score=score)


def paradetox(row: Row, attribute: str) -> Iterator[Sample]:
    """ParaDetox (Logacheva et al., 2022, ACL; CC0-1.0): toxic sentences and up to three neutral ways to say the same.

    The sentences by themselves, the neutral ones positive; the toxic one names the group.
    """
    toxic = text_field(row, "toxic").strip()
    check_near_misses(row, PARADETOX_NEUTRAL, ("toxic", *PARADETOX_NEUTRAL))
    given = [name for name in PARADETOX_NEUTRAL if row.fields.get(name) not in (None, "")]
    neutral = dict.fromkeys(text_field(row, name).strip() for name in given)
    if not neutral:
        raise DataError(f"{row.where}: there is no neutral sentence.")
    yield Sample(attribute, "", toxic, False, group=toxic)
    for text in neutral:
        yield Sample(attribute, "", text, True, group=toxic)


def caa(row: Row, attribute: str) -> Iterator[Sample]:
    """A/B pairs of contrastive activation addition (Rimsky et al., 2024, arXiv 2312.06681; MIT).

    Two samples, the answer that matches the behaviour positive; the published test questions stay test.
    """
    question = text_field(row, "question").strip()
    matching, other = (text_field(row, f"answer_{side}matching_behavior") for side in ("", "not_"))
    if matching.strip() == other.strip():
        raise DataError(f"{row.where}: both answers are {matching!r}.")
    split = Split.TEST if row.split is Split.TEST else None
    yield question_sample(attribute, question, matching, True, group=question, split=split)
    yield question_sample(attribute, question, other, False, group=question, split=split)


@dataclass(frozen=True)
class Loader:
    """How rows of one schema become samples."""

    samples: Callable[[Row, str], Iterable[Sample]]
    """(row, attribute) -> samples. Raises DataError that starts with the row's place."""
    attributes: tuple[str, ...] = ()
    """The names of its attributes; none: the user names it."""
    per_side: int | None = None
    """At most so many positive, and so many negative, samples of each attribute are drawn."""
    configs: Mapping[str, str] = field(default_factory=dict)
    """Data sets on the hub that hold several tables -> the one that is read."""


LOADERS: dict[str, Loader] = {
    "truthfulqa": Loader(
        truthfulqa,
        ("truthfulness",),
        configs={"truthfulqa/truthful_qa": "multiple_choice", "truthful_qa": "multiple_choice"},
    ),
    "toxigen": Loader(toxigen, ("non-toxicity",), configs={"toxigen/toxigen-data": "annotated"}),
    "bbq": Loader(bbq, ("fairness",)),
    "helpsteer": Loader(helpsteer, HELPSTEER_SCORES, per_side=HELPSTEER_PER_SIDE),
    "paradetox": Loader(paradetox, ("non-toxicity",)),
    "caa": Loader(caa),
    "jsonl": Loader(jsonl),
}
