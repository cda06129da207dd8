"""Metadata of a safetensors file: texts in its header, such as the config and the tokenizer of the model."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path


def add_metadata(path: Path, texts: Mapping[str, str]) -> None:
    """Add texts by name to the metadata of a file. The tensors are copied to a new file, which replaces it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with path.open("rb") as source, temporary.open("wb") as target:
        header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **texts}
        content = json.dumps(header, ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)  # tensors begin at a multiple of eight bytes
        target.write(len(content).to_bytes(8, "little") + content)
        shutil.copyfileobj(source, target)
    temporary.replace(path)
