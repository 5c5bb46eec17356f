"""API keys by name: whose a secret is, how often it may ask, and how many texts it may have under way."""

import hashlib
import hmac
import logging
import stat
import threading
import time
import tomllib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from server.config import KEY, KEY_NAME, Settings
from server.errors import InvalidField, RateLimited, StartupError

log = logging.getLogger(__name__)
LARGEST = 2**20  # bytes of the file: thousands of keys, and read in a second
LOOK_EVERY_S = 1.0  # whether the file has changed
State = tuple[int, int, int]  # of a file: when it was written (ns), its size (bytes) and its inode


class KeyEntry(BaseModel):
    """A table of the file of keys; its name is the key's."""

    model_config = ConfigDict(extra="forbid")

    key: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-fA-F]{64}$")  # of the key, in place of itself
    admin: bool = False  # may change checkpoints
    requests_per_minute: int | None = Field(default=None, ge=1)
    max_rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _is_one_key(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("it needs either 'key' or 'sha256'")
        if self.key is not None and not KEY.fullmatch(self.key.get_secret_value()):
            raise ValueError("a key is sent in a header, so it must be of visible ASCII characters, without spaces")
        return self

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256) if self.key is None and self.sha256 else _digest(self.key)


@dataclass(frozen=True)
class ApiKey:
    """A key, without its secret. None: there is no such limit."""

    name: str
    digest: bytes  # SHA-256 of the secret
    admin: bool = False
    requests_per_minute: int | None = None
    max_rows: int | None = None


class Usage:
    """What a key has under way, and what is left of its rate: a bucket that holds a minute's requests."""

    def __init__(self) -> None:
        self.rows = 0
        self._spent = 0.0  # requests, less those that time has given back
        self._at = 0.0

    def wait(self, per_minute: int, now: float) -> float:
        """Takes a request, and returns 0; or the seconds until there is one."""
        self._spent = max(0.0, self._spent - (now - self._at) * per_minute / 60)
        self._at = now
        if self._spent + 1 > per_minute:
            return (self._spent + 1 - per_minute) * 60 / per_minute
        self._spent += 1
        return 0.0


class ApiKeys:
    """All keys of a server: of its settings, and of a file, which is read again when it has changed, beside the
    requests. For any thread."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises StartupError where the file cannot be used."""
        self.asked = settings.asks_for_key  # whether a client needs one at all
        # Whether changing checkpoints takes more than any key: it does from the first admin key on, also when that has
        # been taken out of the file since (`has_admin`).
        self.needs_admin = False
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()  # guards what is used
        self._usage: dict[str, Usage] = {}  # by name: what is used outlasts a change of the file
        self._reading = threading.Lock()
        self._trouble: str | None = None  # why the file cannot be used now, as it was told
        self._state = self._look()
        self._take(self._all())
        if settings.api_keys_file is not None:
            threading.Thread(target=_watch, args=(weakref.ref(self),), name="keys", daemon=True).start()

    def find(self, secret: str) -> ApiKey | None:
        """The key of which this is the secret. What takes time depends on a digest, never on a secret."""
        digest = _digest(secret)
        found = self._keys.get(digest)
        return found if found is not None and hmac.compare_digest(found.digest, digest) else None

    def take_request(self, key: ApiKey | None) -> None:
        """Counts a request of a key. Raises RateLimited."""
        if key is None or key.requests_per_minute is None:
            return
        with self._lock:
            wait = self._usage.setdefault(key.name, Usage()).wait(key.requests_per_minute, self._clock())
        if wait:
            raise RateLimited(
                f"Rate limit reached: this API key may send {key.requests_per_minute} requests a minute.",
                retry_after_s=ceil(wait),
            )

    def take_rows(self, key: ApiKey | None, rows: int) -> Callable[[], None]:
        """Counts texts that a key has under way; who calls what is returned gives them back, once. Raises RateLimited;
        InvalidField for more than it may ever have."""
        if key is None or key.max_rows is None:
            return lambda: None
        if rows > key.max_rows:
            raise InvalidField(f"The request asks for {rows} texts; this API key may have {key.max_rows} at once.")
        with self._lock:
            usage = self._usage.setdefault(key.name, Usage())
            if usage.rows + rows > key.max_rows:
                raise RateLimited(
                    f"Rate limit reached: this API key may have {key.max_rows} texts under way; it has {usage.rows}, "
                    f"and {rows} more are asked for. Try again when some have ended."
                )
            usage.rows += rows

        def give_back() -> None:
            with self._lock:
                usage.rows -= rows

        return give_back

    def read_again(self) -> None:
        """Reads the file where it has changed. One that cannot be used changes nothing, and is told of once."""
        with self._reading:
            try:
                state = self._look()
                if state == self._state:
                    return
                keys = self._all()  # raises before the state is taken: what could not be read is tried again
                self._state, self._trouble = state, None
                log.info("the API keys are read again: %s", ", ".join(key.name for key in keys.values()))
                self._take(keys)
            except StartupError as error:
                if error.message != self._trouble:
                    log.error("%s The keys stay as they were.", error.message)
                self._trouble = error.message

    # --- inside ---

    def _take(self, keys: dict[bytes, ApiKey]) -> None:
        self.has_admin = any(key.admin for key in keys.values())
        self.needs_admin |= self.has_admin
        self._keys = keys
        if self.needs_admin and not self.has_admin:
            log.warning(
                "there is no admin key any more: until the file has one (admin = true), nobody changes checkpoints"
            )

    def _look(self) -> State | None:
        file = self._settings.api_keys_file
        if file is None:
            return None
        try:
            found = file.stat()
        except OSError as error:
            raise _unusable(file, f"it cannot be read: {error.strerror}") from None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _all(self) -> dict[bytes, ApiKey]:
        """By digest. Raises StartupError."""
        settings, found = self._settings, []
        rate, rows = settings.api_key_requests_per_minute, settings.api_key_max_rows
        if settings.api_key is not None:
            found.append(ApiKey("default", _digest(settings.api_key), False, rate, rows))
        if settings.admin_key is not None:
            found.append(ApiKey("admin", _digest(settings.admin_key), admin=True))
        for name, secret in settings.named_api_keys().items():
            found.append(ApiKey(name, _digest(secret), False, rate, rows))
        if settings.api_keys_file is not None:
            for name, entry in read_keys(settings.api_keys_file).items():
                limits = entry.requests_per_minute or rate, entry.max_rows or rows
                found.append(ApiKey(name, entry.digest, entry.admin, *limits))
        keys: dict[bytes, ApiKey] = {}
        for key in found:
            other = keys.setdefault(key.digest, key)
            if other is not key and {other.name, key.name} != {"default", "admin"}:
                raise StartupError(f"The API keys {other.name!r} and {key.name!r} are the same: each needs its own.")
            if key.admin:
                keys[key.digest] = key
        if len({key.name for key in found}) < len(found):
            raise StartupError("Two API keys have the same name: 'default' is MATSTEER_API_KEY's, 'admin' the admin's.")
        return keys


def _watch(keys: "weakref.ref[ApiKeys]") -> None:
    """For as long as somebody has them. In a thread: a large file takes a while, a disk of another machine may hang."""
    while True:
        time.sleep(LOOK_EVERY_S)
        if (watched := keys()) is None:
            return
        try:
            watched.read_again()
        except Exception:
            log.exception("the file of API keys could not be looked at")
        del watched


def read_keys(file: Path) -> dict[str, KeyEntry]:
    """The tables of a file of keys, by name. Raises StartupError, which holds nothing of what a key is."""
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:  # to open a pipe would wait for ever
            raise _unusable(file, f"it is not a file of {LARGEST} bytes at most")
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unusable(file, f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _unusable(file, "it is not UTF-8") from None
    except (ValueError, RecursionError):  # numbers and nesting beyond what Python reads are no TOMLDecodeError
        raise _unusable(file, 'it is not TOML, as in\n[alice]\nkey = "..."\n') from None
    if not tables:
        raise _unusable(file, "it holds no key")
    entries = {}
    for name, table in tables.items():
        if not KEY_NAME.fullmatch(name):
            raise _unusable(file, f"{name[:64]!r} cannot be a key's name: 1 to 64 letters, digits, and . _ - are")
        try:
            entries[name] = KeyEntry.model_validate(table)
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(map(str, (name, *first["loc"])))
            raise _unusable(file, f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    return entries


def _unusable(file: Path, why: str) -> StartupError:
    return StartupError(f"The file of API keys {str(file)!r} (MATSTEER_API_KEYS_FILE) cannot be used: {why}.")


def _digest(secret: SecretStr | str | None) -> bytes:
    text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret or ""
    return hashlib.sha256(text.encode()).digest()
