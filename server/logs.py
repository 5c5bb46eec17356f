"""How lines of the log look."""

import logging

from server.config import Settings

NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}  # in JSON


def configure_logging(settings: Settings) -> None:
    """For the whole process."""
    logging.basicConfig(level=settings.log_level.upper())
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter(settings))


def formatter(settings: Settings) -> logging.Formatter:
    """As `log_format` says: a line for people, or a JSON object with what the message was made of beside it."""
    if settings.log_format == "text":
        return logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter([*NAMES, "message"], rename_fields=NAMES, datefmt="%Y-%m-%dT%H:%M:%S%z")
