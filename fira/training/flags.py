"""The flags of the settings of a training run, and the files of --config, whose keys are the flags."""

from argparse import Action, ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from fira.cli import Parser
from fira.errors import UserError
from fira.files import read_toml
from fira.training.config import TrainConfig
from fira.value_types import AnyText, check, flag_type


class _LoadConfig(Action):
    """`--config FILE`: parse the keys of a file at its position in the command line; later flags override them."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, value: Any, option: str | None = None) -> None:
        _parse_file(Path(value), f"--config {value}", namespace)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings in a --config file. Raises UserError if it is not one."""
    defaults = Namespace(**{setting.name: setting.default for setting in fields(TrainConfig)})
    return _parse_file(path, str(path), defaults)


def _parse_file(path: Path, name: str, namespace: Namespace) -> dict[str, Any]:
    """Set the keys of a file in `namespace`, whose names are the allowed ones, and return them.

    name: of the file in error messages.
    """
    values = read_toml(path, name)
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
