"""Read models saved by transformers (exports, Llama, FlexOlmo, OLMoE) through the same interface as Checkpoint."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fira import files
from fira.checkpoint.manifest import FILE_NAME, MANIFEST, FileRecord, combined_hash, is_plain
from fira.checkpoint.merged_checkpoint import LORA, AdapterRecord, MergedCheckpoint, SavedModel
from fira.checkpoint.ranks import collective_errors, gather_results, this_rank, world_size
from fira.checkpoint.shards import Checkpoint, open_checkpoint
from fira.checkpoint.transformers_mapping import TRANSFORMERS_SCHEMA, expert_tensors, from_transformers
from fira.errors import UserError
from fira.files import errors_naming, one_line
from fira.json_reader import anything, check, mapping, parse, read, record
from fira.models.language_model import EXPORT_PREFIX
from fira.models.registry import from_document, to_document

FIRA_TYPES = ("fira", "rish_ai")  # model_type of exports in the format fira
CONFIG = "config.json"
CONFIG_SIZE = 2**20  # bytes
SUFFIX = ".safetensors"
WEIGHTS = f"model{SUFFIX}"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class PretrainedModel:
    """A model saved by transformers, with the names of Fira. Tensors are read on demand.

    folder: a folder of `save_pretrained`, or a safetensors file with all tensors. The config and the tokenizer of a
    file are in its metadata, as in an export, or next to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._place = folder.parent if folder.is_file() else folder  # of all files
        self._opened: dict[str, Any] = {}
        self._files = self._find_files()
        self._metadata: dict[str, str] = self._open(folder.name).metadata() or {} if folder.is_file() else {}
        self._names: dict[str, str] | None = None  # Fira's name → stored name; None: they differ by a prefix
        self._prefix = EXPORT_PREFIX if all(name.startswith(EXPORT_PREFIX) for name in self._files) else ""
        path, document = self._place / CONFIG, self._read_config()
        if "family" in document:  # the config of a checkpoint
            self._document = document
            return
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

    def _read_config(self) -> dict[str, Any]:
        if not self.has_file(CONFIG):
            raise UserError(f"{self.folder}: no {CONFIG} in its metadata or next to it; copy that of the model there")
        document: dict[str, Any]
        if CONFIG in self._metadata:
            document = parse(self._metadata[CONFIG][:CONFIG_SIZE].encode(), self.folder, mapping(anything))
        else:
            document = read(self._place / CONFIG, mapping(anything), CONFIG_SIZE)
        return document

    def document(self, name: str) -> dict[str, Any]:
        """Return the model's config, the only document, in the form of a checkpoint's config.json."""
        if name != "config":
            raise UserError(f"{self.folder} has no {name}.json; it is a model, not a training run")
        return self._document

    def has_file(self, name: str) -> bool:
        return name in self._metadata or (self._place / name).is_file()

    def file(self, name: str) -> bytes:
        return self._metadata[name].encode() if name in self._metadata else files.read(self._place / name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor by its name in Fira."""
        stored = self.module_name(name)
        if stored in self._files:
            return tuple(self._slice(stored).get_shape())
        shapes = [self._slice(part).get_shape() for part in expert_tensors(stored, 0)]
        if any(len(shape) != 2 for shape in shapes):
            raise UserError(f"{self.folder}: {expert_tensors(stored, 0)[0]} is not a matrix; restore the file")
        return (self._document.get("num_experts", 1), sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows [start, stop) of a tensor (default: all); the rows of expert weights are the experts."""
        stored = self.module_name(name)
        stop = self.shape(name)[0] if stop is None else stop
        if stored in self._files:
            return self._slice(stored)[start:stop]
        experts = (expert_tensors(stored, expert) for expert in range(start, stop))
        try:
            return torch.stack([torch.cat([self._slice(part)[:] for part in parts]) for parts in experts])
        except RuntimeError:
            raise UserError(f"{self.folder}: the experts of {stored} have different shapes; restore the file") from None

    def module_name(self, name: str) -> str:
        """Return the name of a tensor in the model of transformers, by its name in Fira."""
        if self._names is None:
            return f"{self._prefix}{name}"
        if name not in self._names:
            raise UserError(f"{self.folder} has no tensor {name}; it is a folder of another model")
        return self._names[name]

    def _slice(self, name: str) -> Any:
        """Return a lazy slice of a stored tensor."""
        if name not in self._files:
            raise UserError(f"{self.folder} has no tensor {name}; it is a folder of another model")
        file = self._files[name]
        with errors_naming(self._place / file):
            return self._open(file).get_slice(name)

    def _open(self, file: str) -> Any:
        """Return an opened safetensors file, opened once. Raises UserError if there is no such regular file."""
        if file not in self._opened:
            path = self._place / file
            if not path.is_file():
                raise UserError(f"{path} is missing; save the model as safetensors")
            with errors_naming(path):
                self._opened[file] = safe_open(path, framework="pt")
        return self._opened[file]

    def tensor_count(self) -> int:
        """Return the number of stored tensors."""
        return len(self._files)

    def weights_hash(self) -> str:
        """Return a hash of the model's config and weights, whose files are divided over the ranks (collective)."""
        config = set() if CONFIG in self._metadata else {CONFIG}  # otherwise it is a part of the hashed file
        names = sorted(config | set(self._files.values()))[this_rank() :: world_size()]
        hashes = gather_results(lambda: {name: FileRecord.from_file(self._place / name).sha256 for name in names})
        return combined_hash({name: value for share in hashes for name, value in share.items()})

    def _find_files(self) -> dict[str, str]:
        """Return the file name of each tensor."""
        if self.folder.is_file():
            return dict.fromkeys(self._open(self.folder.name).keys(), self.folder.name)
        index = self.folder / f"{WEIGHTS}.index.json"
        if index.exists():
            names: dict[str, str] = read(index, record({"weight_map": mapping(FILE_NAME)}))["weight_map"]
            if outside := [file for file in names.values() if not is_plain(file)]:
                raise UserError(f"{index}: {outside[0]!r} is not a plain file name; give a folder of transformers")
            return names
        return dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)


Saved = Checkpoint | PretrainedModel | MergedCheckpoint


def open_saved(path: str | Path) -> Saved:
    """Open a folder of transformers, or a checkpoint, whose files are all checked (collective).

    A checkpoint of adapters is opened with its base model. Raises UserError if `path` is neither, if it is damaged, if
    no family computes its model, and if the base model is missing or has changed.
    """
    saved = _open_saved(Path(path))
    return with_base(saved) if isinstance(saved, Checkpoint) and saved.has_file(LORA) else saved


def _open_saved(path: Path) -> Checkpoint | PretrainedModel:
    if path.is_file():
        if path.with_name(MANIFEST).is_file():
            raise UserError(f"{path}: a part of a checkpoint; give its folder {path.parent}, whose files are verified")
        if path.suffix != SUFFIX:
            raise UserError(
                f"{path}: not a {SUFFIX} file; others, such as .pt and .pth, can run code when they are loaded: "
                "save the tensors with safetensors.torch.save_file"
            )
        return PretrainedModel(path)
    if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
        return PretrainedModel(path)
    return open_checkpoint(path)


def with_base(adapters: Checkpoint) -> MergedCheckpoint:
    """Open the base model of a checkpoint of adapters, and compare its hash (collective)."""
    adapter_record = AdapterRecord.read(adapters)
    folder = Path(adapter_record.folder)
    with collective_errors():
        if not (folder.is_file() or (folder / CONFIG).is_file()):
            raise UserError(f"{adapters.folder}: its base model {folder} is missing; move it back, or link it there")
    base = _open_saved(folder)
    adapter_record.check_base(base, adapters.folder)
    return MergedCheckpoint(adapters, base, adapter_record)


def stored_config(saved: SavedModel) -> Any:
    """Return the config of a saved model. Raises UserError if it is invalid or has more layers than are stored."""
    document = saved.document("config")
    try:
        config = from_document(document)
    except UserError as error:
        raise UserError(f"{saved.folder}: {one_line(error)}") from None
    if not (isinstance(saved, Checkpoint) and saved.has_file(LORA)):  # which has no tensors of most layers
        _check_layers(saved.folder, config.num_layers, saved.tensor_count())
    return config


def read_weight(
    saved: SavedModel, name: str, shape: tuple[int, ...], start: int = 0, stop: int | None = None
) -> Tensor:
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
