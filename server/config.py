"""Settings: defaults, then `MATSTEER_*` from the environment, then the command line. Frozen once made."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import StartupError

PREFIX = "MATSTEER_"
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


def _shipped(name: str) -> Path:
    """A folder of the repository: beside this package in a clone, else under the working directory."""
    clone = Path(__file__).resolve().parents[1] / name
    return clone if clone.exists() else Path.cwd() / name


class Settings(BaseSettings):
    """Everything that can be set about a server; `MATSTEER_PORT=9000` sets `port`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(default="", description="Hugging Face id or folder; empty: the embedded demo model")
    model_name: str = Field(default="", description="the name clients see; empty: made from the model's id or folder")
    revision: str | None = Field(default=None, description="revision of a Hugging Face id")
    checkpoints: Path = Field(default_factory=lambda: _shipped("checkpoints"), description="folder of checkpoints")
    checkpoint: str | None = Field(default=None, description="NAME or NAME@VERSION active at the start")
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    device: Device = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of the model, at most; 0: all cores")
    native: bool = Field(default=True, description="compile kernels for this CPU, where there is a C++ compiler")
    max_num_seqs: int = Field(default=32, ge=2, le=4096, description="rows generated together")
    block_size: int | None = None
    gpu_memory_utilization: float = 0.9
    cpu_memory_share: float = 0.25
    max_num_batched_tokens: int = Field(
        default=512, ge=2, le=2**20, description="tokens of one forward pass: longer prompts are read in several"
    )
    kv_cache_mib: int = Field(
        default=0, ge=0, description="memory for keys and values; 0: a quarter of what is free, on a GPU nine tenths"
    )
    stream_interval: int = Field(
        default=1, ge=1, description="tokens of a text that are streamed together; more is less work for each"
    )
    queue_limit: int = Field(default=256, ge=1, description="rows that may wait; beyond: 429")
    max_request_rows: int = Field(default=256, ge=1, description="texts one request may ask for: prompts x n x arms")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1, description="size of a request's body; beyond: 413")
    max_context: int | None = Field(
        default=None, ge=2, description="tokens a sequence may have; default: the model's own limit"
    )
    deadline_s: float = Field(default=600.0, gt=0, description="a request that takes longer ends with a 504")
    api_key: SecretStr | None = Field(
        default=None, description="clients send it as a Bearer token; unset: nobody is asked"
    )
    admin_key: SecretStr | None = Field(
        default=None, description="the same for changing checkpoints; unset: the API key is enough"
    )
    remember: bool = Field(
        default=True, description="keep what is loaded and active in the checkpoints folder, for the next start"
    )
    stall_s: float = Field(default=300.0, gt=0, description="a step longer than this makes /readyz say no")
    drain_s: float = Field(
        default=30.0, ge=0, le=86400, description="running requests get this long to finish at a shutdown; then: 503"
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("api_key", "admin_key", mode="before")
    @classmethod
    def _empty_is_unset(cls, given: Any) -> Any:
        return given or None

    @model_validator(mode="after")
    def _every_row_has_its_token(self) -> Self:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, but must be at least max_num_seqs, {self.max_num_seqs}"
            )
        return self

    @model_validator(mode="after")
    def _checkpoint_is_named(self) -> Self:
        if self.checkpoint is not None and not self.checkpoint.strip("@ "):
            raise ValueError("checkpoint must be NAME or NAME@VERSION, or not be set")
        return self

    @property
    def model_path(self) -> str:
        """The folder or Hugging Face id to load."""
        return self.model or str(_shipped("demo/model"))

    @property
    def served_name(self) -> str:
        """The name clients see: as given, else the id, else the folder (a "model" with its parent)."""
        if self.model_name:
            return self.model_name
        path = Path(self.model_path)
        if not path.is_dir():
            return self.model_path
        path = path.resolve()
        return f"{path.parent.name}-model" if path.name == "model" else path.name


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by the `given` values that are not None.

    Raises StartupError: one sentence that names the setting and its value.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise StartupError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return f"Bad settings: {message}."
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"There is no setting called {name!r}."
    return f"Bad setting {name} ({PREFIX}{name.upper()}): {first['input']!r}: {message}."
