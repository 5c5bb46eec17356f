"""Settings: defaults, then `MATSTEER_*` from the environment, then the command line. Frozen once made."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.errors import StartupError

PREFIX = "MATSTEER_"
OLD_NAMES = {  # accepted in place of the new ones: as keywords, in the environment and on the command line
    "max_batch_rows": "max_num_seqs",
    "step_tokens": "max_num_batched_tokens",
    "cache_mib": "kv_cache_mib",
    "max_context": "max_model_len",
}
# Variables that are read elsewhere: by commands that ask a server, and by docker-compose.yml.
OTHER_VARIABLES = frozenset({"url", "torch", "publish", "checkpoints_dir"})
KEY = re.compile(r"[!-~]+")
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+")
KEY_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


def _installed(name: str) -> Path:
    """A place beside this package: in a clone the repository's, in an installed wheel the site-packages'."""
    return Path(__file__).resolve().parents[1] / name


def _demo_model() -> Path:
    return _installed("demo/model")


def _checkpoints_folder() -> Path:
    """`checkpoints` of the clone. For a wheel: of the working directory, where it holds any, else the wheel's own."""
    clone, here, wheel = _installed("checkpoints"), Path.cwd() / "checkpoints", _installed("demo/checkpoints")
    if clone.exists():
        return clone
    return here if any(here.glob("*/*/config.json")) or not wheel.exists() else wheel


@dataclass(frozen=True)
class StepLimits:
    """How much one forward pass computes at most."""

    max_num_seqs: int  # texts
    max_num_batched_tokens: int


STEP_LIMITS = {"cpu": StepLimits(32, 512), "cuda": StepLimits(256, 8192)}  # where nothing is set


class Settings(BaseSettings):
    """Everything that can be set about a server; `MATSTEER_PORT=9000` sets `port`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", protected_namespaces=())

    model: str = Field(
        default="",
        description="Hugging Face id or folder, GGUF file, or a name of `matsteer get`; empty: the embedded demo model",
    )
    model_name: str = Field(default="", description="the name clients see; empty: made from the model's id or folder")
    revision: str | None = Field(default=None, description="revision of a Hugging Face id")
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code that comes with the model; unset: a model that needs its own is refused",
    )
    checkpoints: Path = Field(
        default_factory=_checkpoints_folder,
        description="folder of checkpoints; unset: `checkpoints`, or in a wheel those that it has",
    )
    checkpoint: str | None = Field(
        default=None,
        description="NAME or NAME@VERSION active at the start; unset: the last run's, or `demo`, or the only one",
    )
    chat_template: Path | None = Field(
        default=None, description="file with a chat template (Jinja); unset: the tokenizer's own"
    )
    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 and :: are all that there are")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    device: Device = Field(default="auto", description="auto, cpu, cuda or cuda:N; auto: CUDA where there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of weights and activations; auto: bfloat16 on a GPU (float16 before Ampere), float32 on a CPU",
    )
    threads: int = Field(default=0, ge=0, le=1024, description="CPU threads of the model, at most; 0: all cores")
    tensor_parallel_size: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes that hold the model together, a shard on each of so many GPUs, or all on the CPU",
    )
    native: bool = Field(
        default=True, description="compute with kernels that a C++ compiler makes for this CPU, or Triton for this GPU"
    )
    max_num_seqs: int | None = Field(
        default=None, ge=2, le=4096, description="texts generated together; unset: 256 on a GPU, 32 on a CPU"
    )
    max_num_batched_tokens: int | None = Field(
        default=None,
        ge=2,
        le=2**20,
        description="tokens of one forward pass: longer prompts are read in chunks; unset: 8192 on a GPU, 512 on a CPU",
    )
    kv_cache_mib: int = Field(
        default=0, ge=0, description="memory of the KV cache; 0: what cpu_kv_cache_share or gpu_memory_utilization say"
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of the GPU's memory that weights, activations and the KV cache may take together",
    )
    cpu_kv_cache_share: float = Field(
        default=0.25, gt=0, le=1, description="share of the free memory that the KV cache takes on a CPU"
    )
    block_size: int | None = Field(
        default=None, ge=1, le=4096, description="tokens of a KV cache block; unset: chosen for the device"
    )
    stream_interval: int = Field(
        default=1, ge=1, description="tokens of a text that are streamed together; more is less work for each"
    )
    queue_limit: int = Field(default=256, ge=1, description="texts that may wait; beyond: 429")
    max_request_rows: int = Field(default=256, ge=1, description="texts one request may ask for: prompts x n x arms")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1, description="size of a request's body; beyond: 413")
    max_connections: int = Field(
        default=512,
        ge=1,
        le=2**20,
        description="open at once, for each front worker; for one more the one that has been idle longest is closed",
    )
    keepalive_timeout_s: float = Field(
        default=75.0, gt=0, le=86400, description="a connection without a request is closed after so long"
    )
    client_header_timeout_s: float = Field(
        default=60.0, gt=0, le=86400, description="all headers of a request have to come within this; then: 408"
    )
    client_body_timeout_s: float = Field(
        default=60.0, gt=0, le=86400, description="the whole body of a request has to come within this; then: 408"
    )
    send_timeout_s: float = Field(
        default=60.0, gt=0, le=86400, description="a client that does not read for so long is cut off"
    )
    max_model_len: int | None = Field(
        default=None, ge=2, description="tokens of prompt and answer together; unset: the model's own limit"
    )
    deadline_s: float = Field(default=600.0, gt=0, description="a request that takes longer ends with a 504")
    api_key: SecretStr | None = Field(
        default=None, description="clients send it as a Bearer token; unset: nobody is asked"
    )
    api_keys: SecretStr | None = Field(
        default=None, description="more of them, each with a name for logs and metrics: NAME=KEY NAME=KEY ..."
    )
    api_keys_file: Path | None = Field(
        default=None,
        description="the same in a TOML file, which may be changed while the server runs: a table for each NAME, with "
        "`key` or its `sha256`, and where they are wanted `requests_per_minute`, `max_rows` and `admin = true`",
    )
    api_key_requests_per_minute: int | None = Field(
        default=None, ge=1, description="of each API key that the file gives no other limit; beyond: 429; unset: none"
    )
    api_key_max_rows: int | None = Field(
        default=None, ge=1, description="texts that such a key may have under way at once; beyond: 429; unset: no limit"
    )
    admin_key: SecretStr | None = Field(
        default=None, description="the same for changing checkpoints; unset: the API key is enough"
    )
    api_key_everywhere: bool = Field(
        default=False,
        description="the page at `/` with its files, `/docs`, `/openapi.json` and `/metrics` ask for a key, too; "
        "`/healthz`, `/health` and `/readyz` never do. A browser sends no key for an address: a proxy has to add it",
    )
    cors_allow_origins: str = Field(
        default="",
        description="origins whose pages may call the API from a browser, with commas between them, as in "
        "`https://app.example.org`; `*`: all",
    )
    judge: str = Field(
        default="",
        description="MODULE:FUNCTION that judges answers for the page and /judge; empty: on the demo its own",
    )
    remember: bool = Field(
        default=True, description="keep what is loaded and active in the checkpoints folder, for the next start"
    )
    studies: Path | None = Field(
        default=None, description="SQLite file in which blind comparisons are kept; unset: there are none"
    )
    stall_s: float = Field(
        default=300.0, gt=0, description="a step longer than this is taken for one without end: the server ends"
    )
    engine_process: Literal["auto", "true", "false"] = Field(
        default="auto",
        description="the engine runs in a process of its own, beside those of front_workers; auto: on CUDA, and for "
        "several front workers",
    )
    front_workers: int = Field(
        default=1, ge=1, le=64, description="processes for HTTP and text; several of them share one engine"
    )
    ray: bool = Field(
        default=False,
        description="serve replicas on a Ray cluster (extra `ray`; `RAY_ADDRESS` names it; unset: on this machine)",
    )
    replicas: int = Field(default=1, ge=1, le=4096, description="with ray: servers of the model, at least")
    max_replicas: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="with ray: at most, where there are more for more requests that run and wait; unset: replicas",
    )
    replica_cpus: float = Field(default=1.0, gt=0, le=1024, description="with ray: CPU cores of each replica")
    replica_gpus: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="with ray: GPUs of each replica, as in 0.5 for two on one; unset: 1 where the cluster has any",
    )
    session_affinity: bool = Field(
        default=False,
        description="with ray: requests with the same X-Session-Id go to the same replica, whose cache knows their "
        "conversation; false: all go where there is least to do",
    )
    drain_s: float = Field(
        default=30.0, ge=0, le=86400, description="running requests get this long to finish at a shutdown; then: 503"
    )
    forwarded_allow_ips: str = Field(
        default="127.0.0.1",
        description="addresses and networks of proxies, with commas between them, whose X-Forwarded-For names the "
        "client; `*`: all",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="the least important messages that are logged"
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="json: every line of the log is an object, that of a request with all its fields"
    )
    log_prompts: bool = Field(
        default=False, description="lines of the log in JSON also have the prompt or the messages of a request"
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**_with_new_names(given))

    @field_validator(
        "api_key", "admin_key", "api_keys", "api_keys_file", "api_key_requests_per_minute", "api_key_max_rows",
        "chat_template", "studies", mode="before",
    )  # fmt: skip
    @classmethod
    def _empty_is_unset(cls, given: Any) -> Any:
        return given or None

    @field_validator("api_key", "admin_key")
    @classmethod
    def _fits_into_a_header(cls, given: SecretStr | None) -> SecretStr | None:
        if given is not None and not KEY.fullmatch(given.get_secret_value()):
            raise ValueError("it is sent in a header, so it must be of visible ASCII characters, without spaces")
        return given

    @field_validator("cors_allow_origins")
    @classmethod
    def _is_origins(cls, given: str) -> str:
        for origin in filter(None, map(str.strip, given.split(","))):
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin, as in https://app.example.org: scheme, host, port, no path")
        return given

    @field_validator("api_keys")
    @classmethod
    def _is_names_and_keys(cls, given: SecretStr | None) -> SecretStr | None:
        pairs = [pair.partition("=") for pair in given.get_secret_value().split()] if given else []
        if not all(KEY_NAME.fullmatch(name) and KEY.fullmatch(key) for name, _, key in pairs):
            raise ValueError(
                "it must be NAME=KEY NAME=KEY ...: names of letters, digits, and . _ -, keys of visible ASCII"
            )
        if len({name for name, _, _ in pairs}) < len(pairs):
            raise ValueError("two keys have the same name")
        return given

    @model_validator(mode="after")
    def _every_text_has_its_token(self) -> Self:
        if self.max_num_seqs and self.max_num_batched_tokens and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens is {self.max_num_batched_tokens}, but must be at least max_num_seqs, "
                f"{self.max_num_seqs}"
            )
        return self

    @model_validator(mode="after")
    def _several_fronts_share_an_engine(self) -> Self:
        if self.front_workers > 1 and self.engine_process == "false":
            raise ValueError(
                f"engine_process is false, but front_workers is {self.front_workers}: several of them need the engine "
                "in a process of its own"
            )
        return self

    @model_validator(mode="after")
    def _shards_can_be_placed(self) -> Self:
        given = f"but tensor_parallel_size is {self.tensor_parallel_size}"
        if self.tensor_parallel_size == 1:
            return self
        if self.engine_process == "false":
            raise ValueError(f"engine_process is false, {given}: the engine leads the processes of the model")
        if self.ray:
            raise ValueError(f"ray is true, {given}: a replica on Ray has its model in one process")
        if self.device.startswith("cuda:"):
            raise ValueError(f"device is {self.device}, {given}: CUDA_VISIBLE_DEVICES says which GPUs they take")
        return self

    @model_validator(mode="after")
    def _replicas_have_an_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, but replicas is {self.replicas}")
        return self

    @model_validator(mode="after")
    def _checkpoint_is_named(self) -> Self:
        if self.checkpoint is not None and not self.checkpoint.strip("@ "):
            raise ValueError("checkpoint must be NAME or NAME@VERSION, or not be set")
        return self

    def step_limits(self, device_type: str) -> StepLimits:
        """As they are set, else what suits a device ("cpu", "cuda"); one that is set bounds the other."""
        usual = STEP_LIMITS.get(device_type, STEP_LIMITS["cpu"])
        seqs = self.max_num_seqs or min(usual.max_num_seqs, self.max_num_batched_tokens or usual.max_num_seqs)
        return StepLimits(seqs, self.max_num_batched_tokens or max(usual.max_num_batched_tokens, seqs))

    @property
    def asks_for_key(self) -> bool:
        """Whether a client needs a key."""
        return any(given is not None for given in (self.api_key, self.api_keys, self.api_keys_file))

    @property
    def cors_origins(self) -> list[str]:
        return [origin.strip() for origin in self.cors_allow_origins.split(",") if origin.strip()]

    def named_api_keys(self) -> dict[str, str]:
        """Those of `api_keys`, by name."""
        pairs = self.api_keys.get_secret_value().split() if self.api_keys else []
        return {name: key for name, _, key in (pair.partition("=") for pair in pairs)}

    @property
    def model_path(self) -> str:
        """The folder or Hugging Face id to load."""
        return self.model or str(_demo_model())

    @property
    def served_name(self) -> str:
        """The name clients see: as given, else the id, else the folder (a "model" with its parent)."""
        if self.model_name:
            return self.model_name
        path = Path(self.model_path)
        if path.suffix == ".gguf":
            return path.stem
        if not path.is_dir():
            return self.model_path
        path = path.resolve()
        return f"{path.parent.name}-model" if path.name == "model" else path.name


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, overridden by the `given` values that are not None.

    Raises StartupError: one sentence that names the setting, as it was given, and its value.
    """
    given = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise StartupError(_sentence(error, given)) from None


def default_text(name: str) -> str:
    """A setting's default as people write it; "unset" where it is made of other things."""
    value = Settings.model_fields[name].default
    if value is None or value == "" or value is PydanticUndefined:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def unknown_variables() -> list[str]:
    """A sentence for each variable of the environment that looks like a setting and is none."""
    known = {*Settings.model_fields, *OLD_NAMES, *OTHER_VARIABLES}
    sentences = []
    for variable in sorted(os.environ):
        name = variable.upper().removeprefix(PREFIX).lower()
        if not variable.upper().startswith(PREFIX) or name in known:
            continue
        sentences.append(f"{variable} is in the environment, but no setting has that name.{_nearest(name, known)}")
    return sentences


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, sorted(known), n=1)
    return f" Is {_variable(near[0])} meant?" if near else ""


def _with_new_names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords under their new names, and beside them what the environment sets under an old name. Raises StartupError
    where an old and a new name differ in one place; a keyword goes before the environment, whatever their names."""
    settings = dict(given)
    for old, new in OLD_NAMES.items():
        if old in settings:
            value = settings.pop(old)
            _check_same(old, value, new, settings.setdefault(new, value))
        set_old, set_new = _environment(old), _environment(new)
        if set_old is not None and set_new is not None:
            _check_same(_variable(old), set_old, _variable(new), set_new)
        if set_old is not None and set_new is None:
            settings.setdefault(new, set_old)
    return settings


def _check_same(old: str, value: Any, new: str, other: Any) -> None:
    if str(value) != str(other):
        raise StartupError(f"{new} is {other}, but {old}, its old name, is {value}; set one of them.")


def _variable(name: str) -> str:
    return f"{PREFIX}{name.upper()}"


def _environment(name: str) -> str | None:
    """Upper and lower case mean the same, as pydantic reads the environment."""
    return next((value for variable, value in os.environ.items() if variable.upper() == _variable(name)), None)


def _given_names(given: Mapping[str, Any]) -> dict[str, str]:
    """New name -> old name, of the settings that were given under their old names."""
    return {
        new: old
        for old, new in OLD_NAMES.items()
        if old in given or (new not in given and _environment(new) is None and _environment(old) is not None)
    }


def _sentence(error: ValidationError, given: Mapping[str, Any]) -> str:
    first, old_names = error.errors()[0], _given_names(given)
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        for new, old in old_names.items():
            message = message.replace(new, old)
        return f"Bad settings: {message}."
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return f"There is no setting called {name!r}.{_nearest(name, Settings.model_fields)}"
    name = old_names.get(name, name)
    if name.startswith(("api_key", "admin_key")):  # whatever was given in place of a key may be one: it is not shown
        return f"Bad setting {name} ({_variable(name)}): {message}."
    return f"Bad setting {name} ({_variable(name)}): {first['input']!r}: {message}."
