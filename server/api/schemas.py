"""The bodies of requests. What is not listed here is refused, not dropped."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.types import PositionsName, Sampling
from server.errors import InvalidField
from server.exchange import Ask, Use

Prompt = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Attributes = dict[str, float]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(_Request):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class SteeringPart(_Request):
    """A checkpoint, and multipliers for its attributes (absent: its defaults; unlisted ones are 0)."""

    checkpoint: str | None = Field(None, examples=["demo@1"])
    attributes: Attributes | None = None


class GenerateRequest(_Request):
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

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=256)] | None = Field(
        None, description="a text, or a list of texts: a batch"
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)] | None = Field(
        None, description="a conversation, put into the model's chat template; instead of `prompt`"
    )
    checkpoint: str | None = Field(None, description="`name` or `name@version`; absent: the active checkpoint")
    attributes: Attributes | None = Field(
        None, description="multiplier per attribute; absent: the checkpoint's defaults; `{}`: unsteered; unlisted: 0"
    )
    steering: Annotated[list[SteeringPart], Field(max_length=16)] | None = Field(
        None, description="several checkpoints at once; instead of `checkpoint` and `attributes`"
    )
    positions: PositionsName | None = Field(
        None, description="which tokens are steered; absent: as the checkpoint says"
    )
    max_new_tokens: int = Field(128, ge=1, le=1_000_000)
    temperature: float = Field(1.0, ge=0, le=100, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=10_000_000, description="0: off")
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="the same seed gives the same text, in any batch")
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = Field(
        None, description="texts that end the answer; they are not part of it"
    )
    ignore_eos: bool = False
    n: int = Field(1, ge=1, le=128, description="answers per prompt")
    logprobs: int | None = Field(None, ge=0, le=20, description="log-probabilities of each token and k alternatives")
    baseline: bool = Field(False, description="also generate unsteered: same prompt, seed, sampling and batch")
    trace: bool = Field(False, description="per token and attribute: gate, multiplier x gate, norm, cosine")
    stream: bool = Field(False, description="server-sent events: `token`s, then `done` with the response, or `error`")

    def ask(self) -> Ask:
        """What the service is asked. Raises InvalidField."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("Send exactly one of 'prompt' and 'messages'.", param="prompt")
        return Ask(
            prompts=tuple(_listed(self.prompt)),
            messages=tuple(message.model_dump() for message in self.messages or ()),
            single=not isinstance(self.prompt, list),
            uses=self._uses(),
            positions=self.positions,
            sampling=self._sampling(),
            seed=self.seed,
            n=self.n,
            baseline=self.baseline,
            trace=self.trace,
        )

    def _uses(self) -> tuple[Use, ...]:
        if self.steering is None:
            return (Use(self.checkpoint, self.attributes),)
        if self.checkpoint is not None or self.attributes is not None:
            raise InvalidField("Send either 'steering' or 'checkpoint' and 'attributes', not both.", param="steering")
        return tuple(
            Use(part.checkpoint, part.attributes, param=f"steering.{index}.")
            for index, part in enumerate(self.steering)
        )

    def _sampling(self) -> Sampling:
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop=tuple(_listed(self.stop)),
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


def _listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else value
