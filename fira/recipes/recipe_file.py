"""The file of a recipe: stages, each a command with its flags.

    title = "A small model that answers questions"
    out = "runs/chat-tiny"                  # folder of all outputs; default: runs/ and the name of the file

    [stages.pretrain]                       # writes to the folder runs/chat-tiny/pretrain
    command = "train"
    title = "base"                          # in the report; default: the name of the stage
    seconds = 600                           # expected, for the ETA of the first run
    steps = 4000                            # every other key is a flag of the command

    [stages.chat]
    command = "train"
    init = "{pretrain}"                     # the output of an earlier stage

A list is a flag with several values, and `true` or `false` turns a switch on or off.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fira.errors import UserError
from fira.files import read_toml
from fira.value_types import AnyText, PathName, Positive, check

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
REFERENCE = re.compile(r"\{([^{}]*)\}")  # to the output of an earlier stage
OWN_KEYS = {"command": str, "title": str, "seconds": Positive}  # all other keys of a stage are flags
RESERVED = ("stages", "report.html")  # names in the folder of all outputs
OLD = ".old"  # end of the name of an earlier output
Value = str | int | float | bool | list[Any]
CheckArguments = Callable[[str, list[str]], None]  # of a command; raises UserError


@dataclass(frozen=True)
class Stage:
    """A command with its flags. seconds: expected duration; None if the file has none."""

    name: str
    command: str
    title: str
    seconds: float | None
    flags: dict[str, Value]

    def texts(self) -> Iterator[str]:
        """Yield the values of the flags that are texts."""
        for value in self.flags.values():
            yield from (part for part in (value if isinstance(value, list) else [value]) if isinstance(part, str))

    def references(self) -> set[str]:
        """The names of the stages whose outputs are used."""
        return {name for text in self.texts() for name in REFERENCE.findall(text)}


@dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they are run. out: the folder of their outputs."""

    path: Path
    title: str
    out: Path
    stages: list[Stage]

    def output(self, name: str) -> Path:
        """The file or folder that a stage writes."""
        return self.out / name

    def resolve(self, text: str) -> str:
        """A value with the outputs of other stages in place of the references."""
        return REFERENCE.sub(lambda match: str(self.output(match[1])), text)

    def arguments(self, stage: Stage, out: Path | None = None) -> list[str]:
        """The arguments of a stage's command. out: where it writes, if this is not its output."""
        words = []
        for key, value in stage.flags.items():
            flag = "--" + key.replace("_", "-")
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            elif isinstance(value, list):
                words += [flag, *(self.resolve(str(part)) for part in value)]
            else:
                words.append(f"{flag}={self.resolve(str(value))}")
        return [*words, f"--out={out or self.output(stage.name)}"]

    def command_line(self, stage: Stage) -> str:
        """The command of a stage as it is typed."""
        return shlex.join(["fira", stage.command, *self.arguments(stage)])


def read_recipe(path: Path, out: str | None, check_arguments: CheckArguments) -> Recipe:
    """Read a recipe, and check all its stages before any of them is run.

    out: replaces the folder that the file gives. check_arguments: parses the arguments of a command. Raises UserError,
    which names the file and the stage, if the recipe is invalid.
    """
    content = read_toml(path, str(path))
    for key in content.keys() - {"title", "out", "stages"}:
        raise UserError(f"{path}: unknown key {key}; a recipe has title, out and stages")
    title, folder = content.get("title", path.stem), content.get("out", f"runs/{path.stem}")
    check(f"{path}: title", title, str)
    check(f"{path}: out", folder, PathName)
    stages = content.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise UserError(f"{path}: no stages; give a table [stages.NAME] for each, with a command and its flags")
    recipe = Recipe(path, title, Path(out or folder), [])
    for name, table in stages.items():
        where = f"{path}: stage {name}"
        stage = _stage(name, table, where)
        for reference in sorted(stage.references() - {earlier.name for earlier in recipe.stages}):
            raise UserError(f"{where}: {{{reference}}} is not an earlier stage; name one, or move it before this one")
        try:
            check_arguments(stage.command, recipe.arguments(stage))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        recipe.stages.append(stage)
    return recipe


def _stage(name: str, table: Any, where: str) -> Stage:
    if not NAME.fullmatch(name) or name in RESERVED or name.endswith(OLD):
        names = " or ".join(RESERVED)
        raise UserError(
            f"{where}: a name has letters, digits, '-', '_' and '.', does not end with {OLD}, and is not {names}"
        )
    if not isinstance(table, dict) or "command" not in table:
        raise UserError(f'{where}: no command; give one, as in command = "train"')
    for key, kind in OWN_KEYS.items():
        if key in table:
            check(f"{where}: {key}", table[key], kind)
    flags = {key: value for key, value in table.items() if key not in OWN_KEYS}
    for key, value in flags.items():
        if key == "out":
            raise UserError(f"{where}: out is the folder of the stage, {name}; remove the key")
        if key in ("config", "help"):  # what a config file names would not be known
            raise UserError(f"{where}: {key} is not a key of a stage; give the flags as keys")
        for part in value if isinstance(value, list) else [value]:
            check(f"{where}: {key}", part, AnyText | bool | float)
    return Stage(name, table["command"], table.get("title", name), table.get("seconds"), flags)
