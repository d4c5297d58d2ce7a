"""The child process that talks to a hub: it takes requests on stdin and answers on stdout.

kagglehub and huggingface_hub read the environment when they are imported, print, draw bars and
keep caches in the home directory, and a transfer in them cannot be interrupted. So they run here,
in an environment of their own, with nowhere to print; `hub_process` starts this and ends it.

One JSON object per line, in and out:

    {"do": "revision"}                                -> {"revision": "4"}
    {"do": "describe", "revision": r, "names": [n]}   -> {"files": {n: [bytes, digest or null]}}
    {"do": "get", "revision": r, "name": n, "path": p, "num_bytes": b}
                                                      -> {"num_bytes": b, "digest": d}
    anything                                          -> {"problem": kind, ...}: `Problem`

``get`` appends to what is at ``path`` already. A digest is "sha256:...", "md5:..." or "git:...",
the SHA-1 of git over a file.
"""

import json
import os
import queue
import sys
import threading
from typing import TextIO

from model.presets.hub_handles import Handle, KaggleHandle, parse_handle
from model.presets.transfer import Problem, Transfer


def main() -> None:
    """Serves until stdin ends: then nobody waits for the rest of a transfer either."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    transfer: Transfer | None = None
    while True:
        request = json.loads(requests.get())
        try:
            transfer = transfer or _transfer(parse_handle(sys.argv[1]))
            _write(answers, _answer(transfer, request))
        except Problem as problem:
            _write(answers, {"problem": problem.kind, "detail": problem.detail})
        except ImportError as error:
            _write(answers, {"problem": "failed", "detail": f"{error!s:.200}"})
        except Exception as error:
            # Its text may quote a token or a signed address.
            _write(answers, {"problem": "failed", "detail": type(error).__name__})


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def _write(answers: TextIO, answer: dict[str, object]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _transfer(handle: Handle) -> Transfer:
    # Each imports its library, and only one of them is needed.
    if isinstance(handle, KaggleHandle):
        from model.presets.kaggle_transfer import KaggleTransfer

        return KaggleTransfer(handle)
    from model.presets.hugging_face_transfer import HuggingFaceTransfer

    return HuggingFaceTransfer(handle)


def _answer(transfer: Transfer, request: dict[str, object]) -> dict[str, object]:
    match request:
        case {"do": "revision"}:
            return {"revision": transfer.revision()}
        case {"do": "describe", "revision": str(revision), "names": list(names)}:
            return {"files": transfer.describe(revision, names)}
        case {
            "do": "get",
            "revision": str(revision),
            "name": str(name),
            "path": str(path),
            "num_bytes": int(num_bytes),
        }:
            stated_bytes, digest = transfer.get(revision, name, path, num_bytes)
            return {"num_bytes": stated_bytes, "digest": digest}
    raise Problem("failed", "a request of another version of this package")
