"""Server-sent events, as bytes. https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import json
from collections.abc import Mapping
from typing import Any

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
PING = b": ping\n\n"


def frame(event: str, data: Mapping[str, Any], event_id: int) -> bytes:
    """One event. JSON never contains a raw newline, so one ``data:`` line is enough."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\nid: {event_id}\ndata: {text}\n\n".encode()
