"""Folders of transformers, read like checkpoints: our exports, and any Llama or FlexOlmo."""

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from fira.checkpoint.manifest import MANIFEST
from fira.checkpoint.shards import Checkpoint, find
from fira.checkpoint.transformers_mapping import expert_files, from_stock
from fira.errors import UserError
from fira.files import naming
from fira.models.registry import to_document

OURS = ("fira", "rish_ai")
WEIGHTS = "model.safetensors"


class Saved(Protocol):
    """What a model can be read from; see Checkpoint."""

    folder: Path

    def document(self, name: str) -> dict[str, Any]: ...
    def has_file(self, name: str) -> bool: ...
    def file(self, name: str) -> bytes: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor: ...


def open_saved(path: str | Path) -> Saved:
    """What `path` means: a folder of transformers, else a checkpoint, every file of which is checked (collective).

    UserError where it is neither, where it is damaged, and where the model is none of ours.
    """
    path = Path(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        return PretrainedFolder(path)
    return Checkpoint.open(find(path))


class PretrainedFolder:
    """A folder that transformers' `save_pretrained` wrote, under our names. Only what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}
        document = self._json("config.json")
        self._names: dict[str, str] | None = None  # ours to theirs; None: theirs are ours behind `model.`
        try:
            if document.get("model_type") in OURS:
                self._document = document["shape"]
            else:
                config, self._names = from_stock(document)
                self._document = to_document(config)
        except KeyError:
            raise UserError(f"{folder / 'config.json'} has no shape; it is no export of ours") from None
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        self._files = self._find_files()

    def document(self, name: str) -> dict[str, Any]:
        """The model's config as our own checkpoints have it; there is no other document."""
        if name != "config":
            raise UserError(f"{self.folder} holds no {name}.json; it is a model, not a training run")
        return self._document

    def has_file(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def file(self, name: str) -> bytes:
        with naming(self.folder / name):
            return (self.folder / name).read_bytes()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by our name."""
        theirs = self._theirs(name)
        if theirs in self._files:
            return tuple(self._slice(theirs).get_shape())
        shapes = [self._slice(part).get_shape() for part in expert_files(theirs, 0)]
        return (self._document.get("num_experts", 1), sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` (default: all) of a tensor; of an expert's tensor, these experts."""
        theirs = self._theirs(name)
        stop = self.shape(name)[0] if stop is None else stop
        if theirs in self._files:
            return self._slice(theirs)[start:stop]
        experts = (expert_files(theirs, expert) for expert in range(start, stop))
        return torch.stack([torch.cat([self._slice(part)[:] for part in parts]) for parts in experts])

    def _theirs(self, name: str) -> str:
        if self._names is None:
            return f"model.{name}"
        if name not in self._names:
            raise UserError(f"{self.folder} holds no tensor {name}; it was written by another model")
        return self._names[name]

    def _slice(self, name: str) -> Any:
        """A tensor of theirs, of which no byte is read yet."""
        if name not in self._files:
            raise UserError(f"{self.folder} holds no tensor {name}; it was written by another model")
        path = self.folder / self._files[name]
        with naming(path):
            if path.name not in self._opened:
                self._opened[path.name] = safe_open(path, framework="pt")
            return self._opened[path.name].get_slice(name)

    def _find_files(self) -> dict[str, str]:
        """The file of each tensor."""
        if self.has_file(f"{WEIGHTS}.index.json"):
            return self._json(f"{WEIGHTS}.index.json").get("weight_map", {})
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise UserError(f"{self.folder} holds no {WEIGHTS}; save the model once more as safetensors")
        with naming(path):
            self._opened[WEIGHTS] = safe_open(path, framework="pt")
        return dict.fromkeys(self._opened[WEIGHTS].keys(), WEIGHTS)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads(self.file(name))
        except ValueError:
            raise UserError(f"{self.folder / name} is not JSON") from None
        if not isinstance(document, dict):
            raise UserError(f"{self.folder / name} is not a JSON object")
        return document
