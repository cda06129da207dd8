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


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the index and update its record in the manifest."""
    index = json.loads((folder / "index.json").read_text())
    change(index["tensors"])
    raw = encode_json(index)
    (folder / "index.json").write_bytes(raw)
    record = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["files"].update({"index.json": record}))


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
