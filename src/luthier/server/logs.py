"""The server's log: one JSON object a line, in which no secret stands."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import orjson

_SECRETS = re.compile(
    r"(?:tml-)?ftk_[0-9A-Za-z]+_[0-9A-Za-z]+"  # our own keys
    r"|\bhf_[0-9A-Za-z]{8,}|\bsk-[\w-]{8,}|\bxox[a-z]-[\w-]{8,}|\bgh[a-z]_[0-9A-Za-z]{8,}|\bAKIA[0-9A-Z]{12,}"
    r"|(?i:\bbearer\s+)\S+"
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"  # a password in an address
)
_EXTRA = ("request", "seconds", "key", "job", "attempt")
_LONGEST = 8192


def redact(text: str) -> str:
    """The text without what looks like a key, a token or a password."""
    return _SECRETS.sub("[redacted]", text)


class JsonLines(logging.Formatter):
    """A record as one line of JSON; secrets are struck out of the whole line, whoever put them there."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        shown: dict[str, Any] = {
            "at": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST],
        }
        shown |= {name: vars(record)[name] for name in _EXTRA if vars(record).get(name) is not None}
        if record.exc_info:
            shown["traceback"] = self.formatException(record.exc_info)[-_LONGEST:]
        return redact(orjson.dumps(shown, default=str).decode())


def write_logs(level: int = logging.INFO) -> None:
    """Send every log of the process to stderr, as JSON lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # What these say of each connection and statement is of no use here, and may hold what requests carry.
    for name in ("uvicorn.access", "sqlalchemy", "alembic", "python_multipart", "asyncio"):
        logging.getLogger(name).setLevel(logging.WARNING)
