"""Keeps the cache of converted presets bounded.

An entry goes when its source was converted anew, because nothing asks for it again, or when nobody
used it for a month. An entry that a process holds stays; the next start looks again.
"""

import logging
import re
import time
from collections.abc import Collection
from pathlib import Path

from model.presets.converted_entry import MANIFEST, source_paths
from model.presets.entry_directory import evict, locked, remove_orphans

UNUSED_SECONDS = 30 * 24 * 3600.0

_ENTRY_NAME = re.compile(r"[0-9a-f]{64}")

_logger = logging.getLogger(__name__)


def remove_stale(root: Path, keep: Path, sources: Collection[Path]) -> None:
    """Removes leftovers of killed processes, and the entries that are not wanted any more.

    Args:
        root: The cache.
        keep: The entry that was made from ``sources`` as they are now.
        sources: Resolved paths. Another entry made from any of them is out of date.
    """
    try:
        with locked(root):
            remove_orphans(root)
            for entry in root.iterdir():
                if entry == keep or not _ENTRY_NAME.fullmatch(entry.name):
                    continue
                is_outdated = not source_paths(entry).isdisjoint(map(str, sources))
                if (is_outdated or _is_unused(entry)) and evict(entry):
                    why = "its source changed" if is_outdated else "nobody used it for a month"
                    _logger.info("The converted preset %s is removed: %s.", entry, why)
    except OSError as error:
        # A full cache is a nuisance; the preset is there all the same.
        _logger.warning("Old converted presets in %s cannot be removed: %s", root, error)


def _is_unused(entry: Path) -> bool:
    manifest = entry / MANIFEST
    last_used = (manifest if manifest.exists() else entry).stat().st_mtime
    return time.time() - last_used > UNUSED_SECONDS
