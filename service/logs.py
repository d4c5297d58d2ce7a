"""Log lines of both processes: JSON on standard error.

Prompts and texts are never logged; an error is found by its request id.
"""

import json
import logging
import sys
import time
from typing import Any

# Their INFO lines are about themselves: backends that were not found, sockets that were opened.
_QUIET_LOGGERS = ("jax", "httpx", "uvicorn")


class JsonLines(logging.Formatter):
    """One JSON object a line; control characters are escaped, so no text can forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", None):
            line["request_id"] = request_id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_to_stderr(level: str) -> None:
    """Makes JSON lines on standard error the only log of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in _QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
