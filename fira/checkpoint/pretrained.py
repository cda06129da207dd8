"""Read folders written by transformers (exports, Llama, FlexOlmo) through the same interface as Checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fira import files
from fira.checkpoint.manifest import FILE_NAME, MANIFEST, is_plain
from fira.checkpoint.shards import Checkpoint, open_checkpoint
from fira.checkpoint.transformers_mapping import TRANSFORMERS_SCHEMA, expert_tensors, from_transformers
from fira.errors import UserError
from fira.files import errors_naming, one_line
from fira.json_reader import anything, check, mapping, read, record
from fira.models.registry import from_document, to_document

FIRA_TYPES = ("fira", "rish_ai")  # model_type of exports in the format fira
CONFIG = "config.json"
CONFIG_SIZE = 2**20  # bytes
WEIGHTS = "model.safetensors"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class PretrainedFolder:
    """A folder written by transformers' `save_pretrained`, with Fira's names. Tensors are read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[str, Any] = {}
        self._files = self._find_files()
        self._names: dict[str, str] | None = None  # Fira's name → stored name; None: add the prefix `model.`
        path = folder / CONFIG
        document = read(path, mapping(anything), CONFIG_SIZE)
        if document.get("model_type") in FIRA_TYPES:
            check(document, path, record({"shape": mapping(anything)}))
            self._document = document["shape"]
            return
        check(document, path, TRANSFORMERS_SCHEMA)
        _check_layers(folder, document.get("num_hidden_layers", 0), self.tensor_count())
        try:
            config, self._names = from_transformers(document)
        except UserError as error:
            raise UserError(f"{folder}: {one_line(error)}") from None
        self._document = to_document(config)

    def document(self, name: str) -> dict[str, Any]:
        """Return the model's config, the only document, in the form of a checkpoint's config.json."""
        if name != "config":
            raise UserError(f"{self.folder} has no {name}.json; it is a model, not a training run")
        return self._document

    def has_file(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def file(self, name: str) -> bytes:
        return files.read(self.folder / name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in Fira."""
        stored = self._stored_name(name)
        if stored in self._files:
            return tuple(self._slice(stored).get_shape())
        shapes = [self._slice(part).get_shape() for part in expert_tensors(stored, 0)]
        if any(len(shape) != 2 for shape in shapes):
            raise UserError(f"{self.folder}: {expert_tensors(stored, 0)[0]} is not a matrix; restore the file")
        return (self._document.get("num_experts", 1), sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor (default: all); the rows of expert weights are the experts."""
        stored = self._stored_name(name)
        stop = self.shape(name)[0] if stop is None else stop
        if stored in self._files:
            return self._slice(stored)[start:stop]
        experts = (expert_tensors(stored, expert) for expert in range(start, stop))
        try:
            return torch.stack([torch.cat([self._slice(part)[:] for part in parts]) for parts in experts])
        except RuntimeError:
            raise UserError(f"{self.folder}: the experts of {stored} have different shapes; restore the file") from None

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
        file = self._files[name]
        with errors_naming(self.folder / file):
            return self._open(file).get_slice(name)

    def _open(self, file: str) -> Any:
        """Return an opened safetensors file, opened once. Raises UserError if there is no such regular file."""
        if file not in self._opened:
            path = self.folder / file
            if not path.is_file():
                raise UserError(f"{path} is missing; save the model as safetensors")
            with errors_naming(path):
                self._opened[file] = safe_open(path, framework="pt")
        return self._opened[file]

    def tensor_count(self) -> int:
        """Return the number of stored tensors."""
        return len(self._files)

    def _find_files(self) -> dict[str, str]:
        """Return the file name of each tensor."""
        index = self.folder / f"{WEIGHTS}.index.json"
        if index.exists():
            names: dict[str, str] = read(index, record({"weight_map": mapping(FILE_NAME)}))["weight_map"]
            if outside := [file for file in names.values() if not is_plain(file)]:
                raise UserError(f"{index}: {outside[0]!r} is not a plain file name; give a folder of transformers")
            return names
        return dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)


Saved = Checkpoint | PretrainedFolder


def open_saved(path: str | Path) -> Saved:
    """Open a folder of transformers, or a checkpoint, whose files are all checked (collective).

    Raises UserError if `path` is neither, if it is damaged, and if no family computes its model.
    """
    path = Path(path)
    if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
        return PretrainedFolder(path)
    return open_checkpoint(path)


def stored_config(saved: Saved) -> Any:
    """Return the config of a saved model. Raises UserError if it is invalid or has more layers than are stored."""
    document = saved.document("config")
    try:
        config = from_document(document)
    except UserError as error:
        raise UserError(f"{saved.folder}: {one_line(error)}") from None
    _check_layers(saved.folder, config.num_layers, saved.tensor_count())
    return config


def read_weight(saved: Saved, name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None) -> Tensor:
    """Read rows of a weight. Raises UserError unless it is stored with this global shape, in floating point."""
    if saved.shape(name) != shape:
        raise UserError(f"{saved.folder}: {name} has shape {saved.shape(name)}, the model of {CONFIG} has {shape}")
    weight = saved.read(name, start, stop)
    if weight.dtype not in FLOATS:
        raise UserError(f"{saved.folder}: {name} is stored as {weight.dtype}; save the model in fp32, bf16 or fp16")
    return weight


def _check_layers(folder: Path, layers: int, tensors: int) -> None:
    """Raise UserError if a config has more layers than the folder has tensors, before the layers are created."""
    if layers > tensors:
        raise UserError(f"{folder} stores {tensors} tensors, {CONFIG} requires {layers} layers; restore the file")
