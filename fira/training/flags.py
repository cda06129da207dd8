"""The flags of the settings of a training run, and the files of --config and --deepspeed, which set them."""

from argparse import SUPPRESS, Action, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from fira.cli import Parser
from fira.errors import UserError
from fira.files import LONGEST_TOML, read_toml
from fira.json_reader import anything, mapping
from fira.json_reader import read as read_json
from fira.training.config import SUPERVISED, TrainConfig
from fira.training.deepspeed_config import translate
from fira.value_types import AnyText, check, flag_type
from pipeline.mpi.launchers import launched_size


class _LoadConfig(Action):
    """`--config FILE`: parse the keys of a file at its position in the command line; later flags override them."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        _parse_file(Path(value), f"--config {value}", namespace)


class _LoadDeepSpeed(Action):
    """`--deepspeed FILE`: set what a DeepSpeed configuration says at its position in the command line.

    The value in the namespace is a line about keys without a counterpart, or None.
    """

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        name = f"--deepspeed {value}"
        if not Path(value).is_file():
            raise UserError(f"{name}: no such file; give a ds_config.json")
        document = read_json(Path(value), mapping(anything), LONGEST_TOML)
        ranks = None if any(getattr(namespace, flag) is not None for flag in SUPERVISED) else launched_size()
        try:
            found = translate(document, ranks, vars(namespace))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        _set_keys(found.settings, name, namespace)
        namespace.deepspeed = f"{name}: without counterpart: {', '.join(found.ignored)}" if found.ignored else None


def train_config(options: Namespace) -> TrainConfig:
    """The settings among parsed flags."""
    return TrainConfig(**{setting.name: getattr(options, setting.name) for setting in fields(TrainConfig)})


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a --config file. Raises UserError if it is not one."""
    defaults = Namespace(**{setting.name: setting.default for setting in fields(TrainConfig)})
    return _parse_file(path, str(path), defaults)


def _parse_file(path: Path, name: str, namespace: Namespace) -> dict[str, Any]:
    """Set the keys of a file in `namespace`, whose names are the allowed ones, and return them.

    name: of the file in error messages.
    """
    return _set_keys(read_toml(path, name), name, namespace)


def _set_keys(values: dict[str, Any], name: str, namespace: Namespace) -> dict[str, Any]:
    """Parse values by the names of flags as `_parse_file` does."""
    keys = Parser(None, name)  # without the flags that the program requires; it names the file in its messages
    _add_settings(keys, only=vars(namespace))
    keys.add_verbosity()
    known = vars(keys.parse_args([]))
    for key, entry in values.items():
        if key.replace("-", "_") not in known:
            raise UserError(f"{name}: unknown key {key}; the keys are the flags of --help")
        flag = "--" + key.replace("_", "-")
        off = flag.replace("--", "--no-", 1)
        check(f"{name}: {key}", entry, AnyText | bool | float)
        arguments = [flag if entry else off] if isinstance(entry, bool) else [f"{flag}={entry}"]
        keys.parse_args(arguments, namespace)
    return {key: getattr(namespace, key) for key in (name.replace("-", "_") for name in values)}


def given_flags(config: TrainConfig, without: Collection[str] = ()) -> list[str]:
    """Flags for the settings that differ from their defaults."""
    words = []
    for setting in fields(TrainConfig):
        value = getattr(config, setting.name)
        if value != setting.default and setting.name not in without:
            flag = "--" + setting.name.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words += [flag, str(value)]
    return words


def add_deepspeed(parser: ArgumentParser) -> None:
    """Add `--deepspeed`, and the flag by which the command deepspeed passes the local rank, which MPI finds itself."""
    text = "a DeepSpeed configuration, which sets these flags as --config does"
    parser.add_argument("--deepspeed", metavar="JSON", action=_LoadDeepSpeed, help=text)
    parser.add_argument("--local-rank", help=SUPPRESS)


def add_options(parser: ArgumentParser, only: Collection[str] | None = None) -> None:
    """Add `--config` and a flag for every setting, or for those named in `only`, to a parser."""
    parser.add_argument("--config", metavar="TOML", action=_LoadConfig, help="a file with these flags as keys")
    _add_settings(parser, only)


def _add_settings(parser: ArgumentParser, only: Collection[str] | None) -> None:
    for setting in fields(TrainConfig):
        if only is not None and setting.name not in only:
            continue
        flag, text = "--" + setting.name.replace("_", "-"), setting.metadata["help"]
        if setting.type in (bool, bool | None):
            parser.add_argument(flag, action=BooleanOptionalAction, default=setting.default, help=text)
            continue
        shown = "" if setting.default in (None, "") else " (default: %(default)s)"
        choices = setting.metadata["choices"]
        kind = flag_type(setting.type)
        parser.add_argument(flag, type=kind, default=setting.default, choices=choices, help=text + shown)
