"""Fira: pipeline-parallel training of Mixture-of-Experts language models over MPI.

`from fira import FIRA, encode, decode, load_model, create_pipeline_model`. Each name is imported at its first use, so
that `import fira` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fira.checkpoint.load_model import load_model as load_model
    from fira.generation.text import decode as decode
    from fira.generation.text import encode as encode
    from fira.generation.text import evaluate_perplexity as evaluate_perplexity
    from fira.generation.text import expert_utilisation as expert_utilisation
    from fira.generation.text import sample_text as sample_text
    from fira.models.fira import FIRA as FIRA
    from fira.parallel.pipeline_model import create_pipeline_model as create_pipeline_model

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

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fira' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
