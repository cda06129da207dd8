"""Random settings through the command line, files for --config and the set-up of a run, up to the allocation.

values    numbers of all sizes, text in Unicode, nested lists and tables, and values that the setting allows
words     flags with such values, unknown flags, and a --config file with such keys or with arbitrary text
outcome   a complete set of choices for the run, or a UserError of one line
"""

import os
import resource
import signal
import string
import sys
import tomllib
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed.nn  # torch 2.6 writes a file when it is imported
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

import pipeline
from fira.checkpoint.pretrained import open_saved
from fira.cli import Parser
from fira.devices import choose_devices, choose_precision
from fira.errors import UserError
from fira.models.registry import PRESETS, build
from fira.optim.lr_schedule import LR_SCHEDULES, WARMUP_SHAPES
from fira.optim.settings import OPTIMIZERS
from fira.training import run_folder
from fira.training.config import TrainConfig
from fira.training.flags import add_options
from fira.training.setup import choose_candidate, choose_model
from pipeline.schedule import SCHEDULES

SECONDS, MEMORY = 20, 2**30  # limits of the CPU time of one example, and of the growth of this process in bytes
WRITES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "shutil.rmtree"}

NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**n + d for n in (10, 18, 20, 24, 31, 32, 63, 64, 300) for d in (-1, 0, 1)]),
    st.integers(),
    st.floats(),
    st.floats(0, 1),
    st.sampled_from(["nan", "inf", "-inf", "1e999", "-0.0", "1_0", "٣", "9" * 5000, "0x10", "true", "none", "1e-400"]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(string.ascii_letters + "=,./-:", max_size=30),
    st.sampled_from(["", "a" * 300, "x/" * 3000, "\udcff", "a\nb", "~", ".", "..", "/dev/null", "{}", "%s%d", "*?["]),
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([*PRESETS]),
    "schedule": st.sampled_from([*SCHEDULES]),
    "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16", "fp64"]),
    "device": st.sampled_from(["auto", "cpu", "cuda"]),
    "local_devices": st.sampled_from(["cpu", "cpu,cpu", "cuda:0", "meta", "cpu,cuda:0", ",", "mps", "cpu:7", "cpu:-1"]),
    "recompute": st.sampled_from(["none", "full", "auto", "3"]),
    "lr_schedule": st.sampled_from(LR_SCHEDULES),
    "warmup_shape": st.sampled_from(WARMUP_SHAPES),
    "track": st.sampled_from(["tensorboard", "tensorboard,trackio"]),
    "sample_prompts": st.just(__file__),
    "optimizer": st.sampled_from(OPTIMIZERS),
    "shard": st.sampled_from(["none", "optimizer"]),
    **dict.fromkeys(("beta1", "beta2", "lr_decay", "distill_beta", "min_lr", "eps"), st.sampled_from([0.1, 0.5, 0.9])),
    "on_policy": st.just(0.0),
    "pp": st.integers(1, 2),
    "dp": st.just(1),
    "ep": st.just(1),
    "init": st.just("missing"),
    "objective": st.sampled_from(["pretrain", "sft"]),
}
SMALL = st.integers(1, 64)
FIELDS = sorted({f.name for preset in PRESETS.values() for f in fields(preset)})
CHANGES = st.lists(st.tuples(st.sampled_from(FIELDS), SMALL | SMALL | NUMBERS | TEXTS), max_size=2).map(
    lambda pairs: ",".join(f"{name}={value}" for name, value in pairs)
)
NAMES = [setting.name for setting in fields(TrainConfig) if setting.name != "plan"]  # others measure for seconds
NESTED = st.recursive(NUMBERS | TEXTS | st.booleans(), lambda v: st.lists(v) | st.dictionaries(TEXTS, v), max_leaves=8)
OTHERS = {
    "generate": "max-new-tokens temperature top-k top-p min-p typical-p repetition-penalty presence-penalty seed stop "
    "no-repeat-ngram draft beams eval-text prompt tokenizer model-name",
    "chat": "max-new-tokens temperature top-k top-p seed tokenizer",
    "evaluate": "tokenizer data text-column tasks tasks-path limit batch-size",
    "export": "out format",
    "plot": "out experts",
}


def value_of(name: str) -> st.SearchStrategy[Any]:
    """Values of a setting, most of which are allowed."""
    setting = next(setting for setting in fields(TrainConfig) if setting.name == name)
    likely = CHANGES if name == "model_set" else LIKELY.get(name, TEXTS if "str" in str(setting.type) else SMALL)
    return st.one_of(*[likely] * 8, NUMBERS, TEXTS)


def flag(name: str, value: Any, joined: bool) -> list[str]:
    word = "--" + name.replace("_", "-")
    return [f"{word}={value}"] if joined else [word, str(value)]


FLAGS = st.sampled_from(NAMES).flatmap(lambda name: st.builds(flag, st.just(name), value_of(name), st.booleans()))
WORDS = st.lists(st.one_of(*[FLAGS] * 9, st.lists(TEXTS, min_size=1, max_size=1)), max_size=3).map(
    lambda flags: [word for words in flags for word in words if word not in ("-h", "--help")]
)
KEYS = st.sampled_from(NAMES).flatmap(lambda name: st.tuples(st.just(name), value_of(name) | NESTED))
TABLES = st.lists(KEYS | st.tuples(TEXTS, NESTED), max_size=3)
FILES = st.one_of(
    *[st.none()] * 8,
    TABLES.map(lambda pairs: "".join(f"{toml(key)} = {toml(value)}\n" for key, value in pairs)),
    st.text(),
    st.sampled_from(
        ["lr = " + "[" * 3000, "lr" + ".a" * 3000 + "= 1", "seed = 0x" + "f" * 5000, "[[lr]]", "#" * 10**6]
    ),
)


def toml(value: Any) -> str:
    """A value as TOML. Texts that TOML does not allow stay as they are, and make the file invalid."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def set_up(words: list[str]) -> None:
    """The part of `fira train` that precedes the data and the allocation of the model."""
    parser = Parser(None, "train.py")
    add_options(parser)
    parser.add_verbosity()
    options = vars(parser.parse_args(["--plan", "none", *words]))
    config = TrainConfig(**{name: options[name] for name in asdict(TrainConfig())})
    unused = ("override", "model") if config.init else ("override",)
    stored = {name: value for name, value in asdict(config).items() if value is not None and name not in unused}
    assert tomllib.loads(config.to_toml()) == stored | asdict(config.recipe())
    with run_folder.claim(config):
        pass
    devices = choose_devices(config.device, config.local_devices, 0)
    choose_precision(config.precision, devices)
    model_config, _ = choose_model(config, open_saved(config.init) if config.init else None)
    with torch.device("meta"):
        model = build(model_config)
    candidate = choose_candidate(config, model, devices, pipeline.init())
    assert candidate.count * candidate.microbatch >= config.recipe().batch_size


def outcome(command: Any, words: list[str]) -> str:
    """ "valid", or "error" for a UserError of one line; any other exception is raised."""
    message = ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            command(words)
    except UserError as error:
        message = str(error)
    except Exception as error:
        error.add_note(f"arguments: {words!r:.2000}")
        raise
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    assert message.isprintable()
    assert len(message) < 20_000
    return "error" if message else "valid"


def fuzz(examples: int, folder: str, number: int = 0) -> dict[str, int]:
    """Try random settings and return the number of each outcome. number: seed of the examples."""
    written, counts, before = prepare_process(folder), Counter[str](), peak_memory()
    options = settings(max_examples=examples, database=None, deadline=None, suppress_health_check=[*HealthCheck])

    @seed(number)
    @options
    @given(WORDS, FILES)
    def train(words: list[str], file: str | None) -> None:
        if file is not None:
            Path("run.toml").write_text(file, encoding="utf-8", errors="surrogatepass")
            words = ["--config", "run.toml", *words]
        counts[outcome(set_up, words)] += 1

    @seed(number)
    @settings(options, max_examples=examples // 4)
    @given(st.data())
    def others(data: st.DataObject) -> None:
        command = data.draw(st.sampled_from([*OTHERS]))
        names = st.sampled_from(OTHERS[command].split())
        flags = data.draw(st.lists(st.builds(flag, names, NUMBERS | TEXTS, st.booleans()), max_size=4))
        required = ["missing"] if command == "plot" else ["--checkpoint", "missing"]
        main = import_module(f"fira.commands.{command}").main
        counts[outcome(main, [*required, *(word for words in flags for word in words)])] += 1

    train()
    others()
    assert not written, written
    assert peak_memory() < before + MEMORY
    return dict(counts)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # bytes


def prepare_process(folder: str) -> list[str]:
    """Enter a subfolder, limit the time of examples, and return a list to which writes outside the folder are added.

    A subfolder, because `..` is a valid folder for output.
    """
    os.makedirs(os.path.join(folder, "work"))
    os.chdir(os.path.join(folder, "work"))
    set_hypothesis_home_dir(folder)
    sys.dont_write_bytecode = True
    written: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (
            (opened or event in WRITES)
            and isinstance(arguments[0], str)
            and not os.path.abspath(arguments[0]).startswith((folder, "/dev/"))
        ):
            written.append(f"{event} {arguments[0]}")

    def expired(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    sys.addaudithook(audit)
    signal.signal(signal.SIGPROF, expired)
    return written
