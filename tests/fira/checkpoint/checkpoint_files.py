"""Names of the files of a checkpoint, and functions that forge its manifest or index."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from fira.checkpoint.manifest import encode_json, seal

MODEL = "model-00001-of-00001.safetensors"
FILES = [MODEL, "optimizer-00001-of-00001.safetensors", "config.json", "tokenizer.json", "index.json", "manifest.json"]


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the manifest and recompute its own hash."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (folder / "manifest.json").write_bytes(seal(manifest))


def edit_document(folder: Path, name: str, change: Callable[[dict], None]) -> None:
    """Change a JSON document and update its record in the manifest."""
    document = json.loads((folder / f"{name}.json").read_text())
    change(document)
    write_document(folder, name, encode_json(document))


def write_document(folder: Path, name: str, raw: bytes) -> None:
    """Replace the text of a JSON document and update its record in the manifest."""
    (folder / f"{name}.json").write_bytes(raw)
    record = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["files"].update({f"{name}.json": record}))


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the index and update its record in the manifest."""
    edit_document(folder, "index", lambda index: change(index["tensors"]))


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of weights and optimizer state of a checkpoint."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name.endswith(".safetensors")}


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
