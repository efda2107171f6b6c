"""A manifest lists the files of a folder with their checksums, so that damage is seen before anything is loaded.

It finds what disks, copies and people do to files. It is no signature: whoever can write into the folder can write a
manifest that fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
"""The name of the file in a checkpoint, or beside best weights, that lists the others."""


class DamageError(Exception):
    """A folder is not as it was written; the message says what is wrong, and goes on a sentence about the folder."""


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """List all files below ``folder`` in its manifest, together with facts about them that JSON can hold."""
    files = {
        path.relative_to(folder).as_posix(): _fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(_text({**facts, "files": files}), encoding="utf-8")


def checked_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder whose files are all as they were written.

    Raises:
        DamageError: A file is missing, damaged, or none of the folder's own; or there is no manifest.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode("utf-8")
        manifest = json.loads(text)
        files = manifest["files"]
        # Whatever has changed in the manifest itself shows in its text, or in what it says of the others.
        if text != _text(manifest):
            raise ValueError
        for name, fingerprint in files.items():
            _check_file(folder / name, fingerprint)
    except FileNotFoundError as error:
        name = MANIFEST if error.filename is None else Path(error.filename).name
        raise DamageError(f"{name} is missing") from error
    except OSError as error:
        raise DamageError(f"it cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{MANIFEST} is damaged") from error
    # File systems and desktops leave hidden files of their own.
    paths = (path for path in folder.rglob("*") if not path.is_dir() and not path.name.startswith("."))
    if strange := sorted({path.relative_to(folder).as_posix() for path in paths} - files.keys() - {MANIFEST}):
        raise DamageError(f"{strange[0]} is no file of it")
    return manifest


def checksum_of(data: bytes) -> str:
    """Return the SHA-256 of bytes, as manifests hold it."""
    return hashlib.sha256(data).hexdigest()


def _file_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _file_checksum(path)}


def _check_file(path: Path, fingerprint: Mapping[str, Any]) -> None:
    size = path.stat().st_size
    if size != fingerprint["bytes"]:
        raise DamageError(f"{path.name} has {size} bytes in place of {fingerprint['bytes']}")
    if _file_checksum(path) != fingerprint["sha256"]:
        raise DamageError(f"{path.name} is damaged: its checksum is another one")


def _text(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=2) + "\n"
