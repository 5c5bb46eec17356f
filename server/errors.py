"""What can go wrong, and what the client is told.

Every class knows its HTTP status and its `type`, the stable word that programs match on:

ServerError                      500  internal_error
├── StartupError                  -   the process does not start (one sentence on stderr, exit status 1)
├── BadRequest                   400  bad_request
│   ├── UnsupportedField         400  unsupported_field
│   └── Refused                  4xx  the status's own name, as in unsupported_media_type
├── Unauthorized                 401  unauthorized         (with WWW-Authenticate)
├── Forbidden                    403  forbidden
├── NotFound                     404  not_found
│   ├── UnknownCheckpoint        404  unknown_checkpoint
│   └── UnknownModel             404  model_not_found      (OpenAI's word)
├── MethodNotAllowed             405  method_not_allowed
├── UnusableCheckpoint           409  unusable_checkpoint
│   └── WrongModel               409  wrong_model
├── CheckpointInUse              409  checkpoint_in_use
├── BodyTooLarge                 413  body_too_large
├── PromptTooLong                413  prompt_too_long
├── InvalidField                 422  invalid_field
│   └── UnknownAttribute         422  unknown_attribute
├── QueueFull                    429  queue_full           (with Retry-After)
├── ClientGone                   499  client_gone          (nobody is left to read it)
├── GenerationFailed             500  generation_failed
│   └── NotFinite                500  not_finite
├── EngineDown                   503  engine_down
└── DeadlineExceeded             504  deadline_exceeded
"""

from http import HTTPStatus


class ServerError(Exception):
    """An error with an HTTP status, a type, and the request field at fault where there is one."""

    status: int = 500
    type: str = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

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
    status = 413
    type = "prompt_too_long"


class InvalidField(ServerError):
    status = 422
    type = "invalid_field"


class UnknownAttribute(InvalidField):
    type = "unknown_attribute"


class QueueFull(ServerError):
    status = 429
    type = "queue_full"

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)}


class ClientGone(ServerError):
    status = 499
    type = "client_gone"


class GenerationFailed(ServerError):
    """A step of the model failed; only the requests in that step see this."""

    type = "generation_failed"


class NotFinite(GenerationFailed):
    """The model's output is NaN or infinite, so that there is nothing to draw from or to measure."""

    type = "not_finite"


class EngineDown(ServerError):
    status = 503
    type = "engine_down"


class DeadlineExceeded(ServerError):
    status = 504
    type = "deadline_exceeded"
