"""The bodies of requests. What is not listed here is refused, not dropped."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.sequence import PositionsName, SamplingParams
from server.errors import InvalidField
from server.exchange import BASELINE, STEERED, Arm, Ask, ScoreAsk, Use

Prompt = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Attributes = dict[str, float]
LONGEST = 1_000_000  # tokens of an answer, of which as many come as the model has room for


class StrictRequest(BaseModel):
    """Types are as they are named, and numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(StrictRequest):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class SteeringPart(StrictRequest):
    """A checkpoint, and multipliers for its attributes (absent: its defaults; unlisted ones are 0)."""

    checkpoint: str | None = Field(None, examples=["demo@1"])
    attributes: Attributes | None = None


class _Steered(StrictRequest):
    """What is to be steered by."""

    checkpoint: str | None = Field(None, description="`name` or `name@version`; absent: the active checkpoint")
    attributes: Attributes | None = Field(
        None, description="multiplier per attribute; absent: the checkpoint's defaults; `{}`: unsteered; unlisted: 0"
    )
    steering: Annotated[list[SteeringPart], Field(max_length=16)] | None = Field(
        None, description="several checkpoints at once; instead of `checkpoint` and `attributes`"
    )

    def uses(self, where: str = "") -> tuple[Use, ...]:
        """`where`: what stands before the fields' names in errors."""
        if self.steering is None:
            return (Use(self.checkpoint, self.attributes, param=where),)
        if self.checkpoint is not None or self.attributes is not None:
            raise InvalidField(
                "Send either 'steering' or 'checkpoint' and 'attributes', not both.", param=f"{where}steering"
            )
        return tuple(
            Use(part.checkpoint, part.attributes, param=f"{where}steering.{index}.")
            for index, part in enumerate(self.steering)
        )


class Rules(StrictRequest):
    """How tokens are drawn, and where a text ends."""

    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=10_000_000, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(
        None,
        ge=-(2**63),
        lt=2**63,
        description="the same seed gives the same text, in any batch; every prompt of a list draws with it",
    )
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="texts that end the answer; they are not part of it"
    )
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=128, description="answers per prompt")
    stream: bool = Field(False, description="server-sent events: pieces of the text as they come")

    def sampling(self, max_new_tokens: int, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            max_new_tokens=max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(listed(self.stop)),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class _Generated(Rules):
    """What to generate from, and by which rules."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=256)] | None = Field(
        None, description="a text, or a list of texts: a batch"
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="a conversation, put into the model's chat template; instead of `prompt`"
    )
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )
    max_new_tokens: int = Field(128, ge=1, le=LONGEST)
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of each token and k alternatives")
    trace: bool = Field(False, description="per token and attribute: gate, multiplier x gate, norm, cosine")

    def _ask(self, arms: tuple[Arm, ...], reference: int) -> Ask:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("Send exactly one of 'prompt' and 'messages'.", param="prompt")
        return Ask(
            prompts=tuple(listed(self.prompt)),
            messages=tuple(message.model_dump() for message in self.messages or ()),
            single=not isinstance(self.prompt, list),
            arms=arms,
            reference=reference,
            positions=self.positions,
            sampling=self.sampling(self.max_new_tokens, self.logprobs),
            seed=self.seed,
            n=self.n,
            trace=self.trace,
        )


class GenerateRequest(_Generated, _Steered):
    """Generate from a prompt, a list of prompts or a conversation, steered and, with `baseline`, unsteered."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Q: What colour is the sky? A:",
                    "attributes": {"truthfulness": 1.0},
                    "max_new_tokens": 24,
                    "temperature": 0,
                    "baseline": True,
                }
            ]
        },
    )

    baseline: bool = Field(False, description="also generate unsteered: same prompt, seed and sampling")

    def ask(self) -> Ask:
        """What the service is asked. Raises InvalidField."""
        steered = Arm(STEERED.name, self.uses())
        return self._ask((steered, BASELINE), reference=1) if self.baseline else self._ask((steered,), reference=0)


class ArmPart(_Steered):
    """One way to answer."""

    name: str = Field(min_length=1, max_length=64)


class CompareRequest(_Generated):
    """Generate from one prompt by several arms, each compared with the first."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Q: What colour is the sky? A:",
                    "arms": [
                        {"name": "baseline", "attributes": {}},
                        {"name": "truthful", "attributes": {"truthfulness": 1.0}},
                        {"name": "rude", "attributes": {"civility": -0.5}},
                    ],
                    "max_new_tokens": 24,
                    "seed": 1,
                }
            ]
        },
    )

    arms: Annotated[list[ArmPart], Field(min_length=1, max_length=32)]

    def ask(self) -> Ask:
        """What the service is asked. Raises InvalidField."""
        names = [arm.name for arm in self.arms]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise InvalidField(f"Two arms are called {name!r}.", param=f"arms.{index}.name")
        arms = tuple(Arm(arm.name, arm.uses(f"arms.{index}.")) for index, arm in enumerate(self.arms))
        return self._ask(arms, reference=0)


class ScoreRequest(_Steered):
    """Log-likelihoods of given continuations of a prompt."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "prompt": "Q: What colour is the sky? A: What a good question.",
                    "continuations": [" The sky is blue.", " The sky is green."],
                    "attributes": {"truthfulness": 1.0},
                }
            ]
        },
    )

    prompt: Prompt
    continuations: Annotated[list[Prompt], Field(min_length=1, max_length=256)]
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )

    def ask(self) -> ScoreAsk:
        """What the service is asked. Raises InvalidField."""
        return ScoreAsk(self.prompt, tuple(self.continuations), self.uses(), self.positions)


class VersionRequest(StrictRequest):
    """Which version of a checkpoint."""

    version: Annotated[str, Field(min_length=1, max_length=256)] | None = None


def listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value
