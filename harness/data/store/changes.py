"""Files that a store was built of, and that are no longer what they were."""

from __future__ import annotations

from pathlib import Path

from harness.data.store.sources import Source
from harness.data.store.stored import StoredFrames

__all__ = ["changed_sources", "changed_text"]

_SMALL = 64 << 20  # bytes of a file whose content is compared when its time of change is another


def changed_sources(store: StoredFrames, compare_content: bool = False) -> list[str]:
    """Files of a store that are there and have changed, and how. Files that are not there say nothing.

    Args:
        store: which has its own copy of everything.
        compare_content: whether the content of files of the same size is compared, whatever their time of change;
            otherwise that of files up to 64 MiB whose time is another.
    """
    found = []
    for entry in store.manifest["sources"]:
        path = Path(entry["absolute"])
        if not path.is_file():
            continue
        now = Source.of(path)
        if now.bytes != entry["bytes"]:
            found.append(f"{path} has {now.bytes} bytes instead of {entry['bytes']}")
        elif compare_content or (now.modified != entry["modified"] and now.bytes <= _SMALL):
            if now.sha256() != entry["sha256"]:
                found.append(f"{path} has another content")
        elif now.modified != entry["modified"]:
            found.append(f"{path} has been written to (`harness-data info --verify` compares the content)")
    return found


def changed_text(store: StoredFrames) -> str:
    """Sentence on files that have changed since a store was built of them; no text if none has."""
    changed = changed_sources(store)
    if not changed:
        return ""
    more = f", and {len(changed) - 1} more files have changed" if len(changed) > 1 else ""
    return (
        f"{store.path} was built of other data than are there now: {changed[0]}{more}. The store has the frames of "
        f"before; build it anew if those of now are meant"
    )
