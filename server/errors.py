"""What can go wrong, and what the client is told.

Every class knows its HTTP status, its `type`, and its `code`. Both are stable words that programs match on: `code` is
OpenAI's word for what their clients act on, and else the same as `type`:

class                         status  type                   code
ServerError                      500  internal_error
├── StartupError                  -   the process does not start (one sentence on stderr, exit status 1)
├── BadRequest                   400  bad_request
│   ├── UnsupportedField         400  unsupported_field
│   └── Refused                  4xx  the status's own name, as in unsupported_media_type
├── Unauthorized                 401  unauthorized           invalid_api_key          with WWW-Authenticate
├── Forbidden                    403  forbidden
├── NotFound                     404  not_found
│   ├── UnknownCheckpoint        404  unknown_checkpoint
│   └── UnknownModel             404  model_not_found
├── MethodNotAllowed             405  method_not_allowed
├── UnusableCheckpoint           409  unusable_checkpoint
│   └── WrongModel               409  wrong_model
├── CheckpointInUse              409  checkpoint_in_use
├── BodyTooLarge                 413  body_too_large
├── PromptTooLong                413  prompt_too_long        context_length_exceeded  400 under /v1, as OpenAI's
├── InvalidField                 422  invalid_field
│   └── UnknownAttribute         422  unknown_attribute
├── RateLimited                  429  rate_limit_exceeded                             with Retry-After
│   └── QueueFull                429  queue_full             rate_limit_exceeded      with Retry-After
├── ClientGone                   499  client_gone            (nobody is left to read it)
├── GenerationFailed             500  generation_failed
│   ├── NotFinite                500  not_finite
│   └── OutOfMemory              503  out_of_memory          with Retry-After
├── ChatTemplateUnusable         501  chat_template_unusable
├── EngineDown                   503  engine_down
├── StorageFailed                503  storage_failed
└── DeadlineExceeded             504  deadline_exceeded
"""

from http import HTTPStatus
from typing import Self


class ServerError(Exception):
    """An error with an HTTP status, a type, a code, and the request field at fault where there is one."""

    status: int = 500
    type: str = "internal_error"
    openai_code: str | None = None  # OpenAI's word for it; None: no client looks for one
    openai_status: int | None = None  # under /v1; None: the same as elsewhere

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    @property
    def code(self) -> str:
        return self.openai_code or self.type

    @property
    def headers(self) -> dict[str, str]:
        return {}


class StartupError(ServerError):
    """The settings, the model folder or the device do not allow a start."""

    type = "startup_error"


class BadRequest(ServerError):
    status = 400
    type = "bad_request"


class Refused(BadRequest):
    """What the HTTP framework refuses with a 4xx of its own."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        if status in {known.value for known in HTTPStatus}:
            self.type = HTTPStatus(status).name.lower()


class UnsupportedField(BadRequest):
    """A field that other servers' APIs have and this route does not; on the OpenAI routes any that is not there."""

    type = "unsupported_field"


class Unauthorized(ServerError):
    status = 401
    type = "unauthorized"
    openai_code = "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(ServerError):
    status = 403
    type = "forbidden"


class NotFound(ServerError):
    status = 404
    type = "not_found"


class UnknownCheckpoint(NotFound):
    type = "unknown_checkpoint"


class UnknownModel(NotFound):
    """A name that is neither the base model's nor a checkpoint's."""

    type = "model_not_found"


class MethodNotAllowed(ServerError):
    status = 405
    type = "method_not_allowed"


class UnusableCheckpoint(ServerError):
    """The checkpoint's folder is damaged."""

    status = 409
    type = "unusable_checkpoint"


class WrongModel(UnusableCheckpoint):
    """A sound checkpoint, made for another base model."""

    type = "wrong_model"


class CheckpointInUse(ServerError):
    """The active checkpoint cannot be unloaded."""

    status = 409
    type = "checkpoint_in_use"


class BodyTooLarge(ServerError):
    status = 413
    type = "body_too_large"


class PromptTooLong(ServerError):
    """More tokens than a text may have, or than fit. Under /v1 its status is OpenAI's."""

    status = 413
    type = "prompt_too_long"
    openai_code = "context_length_exceeded"
    openai_status = 400

    @classmethod
    def of(cls, context: int, wanted: str, what: str, *, param: str | None = None) -> Self:
        """With the words that OpenAI's clients look for.

        context: tokens that prompt and answer may have together.
        wanted: what was sent, as in "120 tokens".
        what: where it was sent, as in "messages".
        """
        return cls(
            f"This model's maximum context length is {context} tokens. However, you requested {wanted} in the {what}: "
            f"the prompt is too long. Prompt and answer share the {context} tokens, and an answer takes at least one, "
            f"so that a prompt may have {context - 1}.",
            param=param,
        )


class InvalidField(ServerError):
    status = 422
    type = "invalid_field"


class UnknownAttribute(InvalidField):
    type = "unknown_attribute"


class RateLimited(ServerError):
    """An API key has asked for more than it may."""

    status = 429
    type = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class QueueFull(RateLimited):
    type = "queue_full"
    openai_code = "rate_limit_exceeded"


class ClientGone(ServerError):
    status = 499
    type = "client_gone"


class GenerationFailed(ServerError):
    """A step of the model failed; only the requests in that step see this."""

    type = "generation_failed"


class NotFinite(GenerationFailed):
    """The model's output is NaN or infinite, so that there is nothing to draw from or to measure."""

    type = "not_finite"


class OutOfMemory(GenerationFailed):
    """The device had no memory for a step; the same request may well find some later."""

    status = 503
    type = "out_of_memory"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class ChatTemplateUnusable(ServerError):
    """The server's chat template fails, or leaves out what a message says: for the operator to mend, not the client."""

    status = 501
    type = "chat_template_unusable"


class EngineDown(ServerError):
    status = 503
    type = "engine_down"


class StorageFailed(ServerError):
    """What a client wants kept, or looks for, is in a file that cannot be used now, as on a full disk."""

    status = 503
    type = "storage_failed"


class DeadlineExceeded(ServerError):
    status = 504
    type = "deadline_exceeded"


OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "can't allocate memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether PyTorch, or a library that it calls, found no memory on a device, in whatever words they say so; also
    where that is what led to the error, as to that of a capture which is ended."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def failure_of(error: Exception, what: str) -> GenerationFailed:
    """What the clients are told whose work on the model failed. `what` it was, as in "this request's batch"."""
    if is_out_of_memory(error):
        return OutOfMemory(f"The device ran out of memory on {what}; try again later, or with less.")
    return GenerationFailed(f"The model failed on {what}; try again.")
