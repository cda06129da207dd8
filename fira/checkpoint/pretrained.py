"""Read folders written by transformers (exports, Llama, FlexOlmo) through the same interface as Checkpoint."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fira.checkpoint.manifest import MANIFEST
from fira.checkpoint.shards import Checkpoint
from fira.checkpoint.step_folders import find
from fira.checkpoint.transformers_mapping import expert_tensors, from_transformers
from fira.errors import UserError
from fira.files import errors_naming
from fira.models.registry import to_document

FIRA_TYPES = ("fira", "rish_ai")  # model_type of exports in the format fira
WEIGHTS = "model.safetensors"


class PretrainedFolder:
    """A folder written by transformers' `save_pretrained`, with Fira's names. Tensors are read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}
        document = self._json("config.json")
        self._names: dict[str, str] | None = None  # Fira's name → stored name; None: add the prefix `model.`
        try:
            if document.get("model_type") in FIRA_TYPES:
                self._document = document["shape"]
            else:
                config, self._names = from_transformers(document)
                self._document = to_document(config)
        except KeyError:
            raise UserError(f"{folder / 'config.json'} has no shape; give a folder that Fira exported") from None
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        self._files = self._find_files()

    def document(self, name: str) -> dict[str, Any]:
        """Return the model's config, the only document, in the form of a checkpoint's config.json."""
        if name != "config":
            raise UserError(f"{self.folder} has no {name}.json; it is a model, not a training run")
        return self._document

    def has_file(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def file(self, name: str) -> bytes:
        with errors_naming(self.folder / name):
            return (self.folder / name).read_bytes()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in Fira."""
        stored = self._stored_name(name)
        if stored in self._files:
            return tuple(self._slice(stored).get_shape())
        shapes = [self._slice(part).get_shape() for part in expert_tensors(stored, 0)]
        return (self._document.get("num_experts", 1), sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor (default: all); the rows of expert weights are the experts."""
        stored = self._stored_name(name)
        stop = self.shape(name)[0] if stop is None else stop
        if stored in self._files:
            return self._slice(stored)[start:stop]
        experts = (expert_tensors(stored, expert) for expert in range(start, stop))
        return torch.stack([torch.cat([self._slice(part)[:] for part in parts]) for parts in experts])

    def _stored_name(self, name: str) -> str:
        if self._names is None:
            return f"model.{name}"
        if name not in self._names:
            raise UserError(f"{self.folder} has no tensor {name}; it is a folder of another model")
        return self._names[name]

    def _slice(self, name: str) -> Any:
        """Return a lazy slice of a stored tensor."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}; it is a folder of another model")
        path = self.folder / self._files[name]
        with errors_naming(path):
            if path.name not in self._opened:
                self._opened[path.name] = safe_open(path, framework="pt")
            return self._opened[path.name].get_slice(name)

    def _find_files(self) -> dict[str, str]:
        """Return the file name of each tensor."""
        if self.has_file(f"{WEIGHTS}.index.json"):
            return self._json(f"{WEIGHTS}.index.json").get("weight_map", {})
        path = self.folder / WEIGHTS
        if not path.is_file():
            raise UserError(f"{self.folder} has no {WEIGHTS}; save the model as safetensors")
        with errors_naming(path):
            self._opened[WEIGHTS] = safe_open(path, framework="pt")
        return dict.fromkeys(self._opened[WEIGHTS].keys(), WEIGHTS)

    def _json(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads(self.file(name))
        except ValueError:
            raise UserError(f"{self.folder / name} is not valid JSON") from None
        if not isinstance(document, dict):
            raise UserError(f"{self.folder / name} is not a JSON object")
        return document


Saved = Checkpoint | PretrainedFolder


def open_saved(path: str | Path) -> Saved:
    """Open a folder of transformers, or a checkpoint, whose files are all checked (collective).

    Raises UserError if `path` is neither, if it is damaged, and if no family computes its model.
    """
    path = Path(path)
    if (path / "config.json").is_file() and not (path / MANIFEST).is_file():
        return PretrainedFolder(path)
    return Checkpoint.open(find(path))
