"""Logs of the processes of the service: lines for people, or one JSON object per line for a collector."""

import json
import logging
import sys
import time
from typing import Literal

LogFormat = Literal["plain", "json"]


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message"}`, and `traceback` where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log_format: LogFormat, level: int = logging.INFO) -> None:
    """Send this process's logs to standard error. Others' libraries only speak up from warnings on."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else plain)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("uncanny").setLevel(level)
