"""Fira: pipeline-parallel training of Mixture-of-Experts language models over MPI.

`from fira import FIRA, encode, decode, load_model, create_pipeline_model`. Each name is imported at its first use, so
that `import fira` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fira.checkpoint.load_model import load_model
    from fira.generation.text import decode, encode, evaluate_perplexity, expert_utilisation, sample_text
    from fira.models.fira import FIRA
    from fira.parallel.pipeline_model import create_pipeline_model

__all__ = [
    "FIRA",
    "create_pipeline_model",
    "decode",
    "encode",
    "evaluate_perplexity",
    "expert_utilisation",
    "load_model",
    "sample_text",
]

_MODULES = {
    "FIRA": "fira.models.fira",
    "create_pipeline_model": "fira.parallel.pipeline_model",
    "decode": "fira.generation.text",
    "encode": "fira.generation.text",
    "evaluate_perplexity": "fira.generation.text",
    "expert_utilisation": "fira.generation.text",
    "load_model": "fira.checkpoint.load_model",
    "sample_text": "fira.generation.text",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fira' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
