"""Add the adapters of LoRA to a model."""

from torch import nn

from fira.errors import UserError
from fira.models.language_model import LanguageModel
from fira.models.registry import family_of
from fira.nn.lora import Lora
from fira.nn.lora_linear import LoraLinear
from fira.nn.moe.experts import ExpertBank


def add_adapters(model: LanguageModel, lora: Lora) -> None:
    """Freeze the parameters of a model, and add trainable adapters to the matrices of the targets, in place.

    The adapters have no values yet; `initialise` fills them. Raises UserError if the head is a target and shares its
    weight with the embedding: a merged adapter would change the embedding as well.
    """
    if model.tied and "head" in lora.targets:
        name = family_of(model.config).name
        raise UserError(f"--lora {lora}: the head of this {name} shares its weight with the embedding; omit head")
    model.requires_grad_(False)
    model.lora = lora
    for module in list(model.modules()):
        if getattr(module, "lora_target", None) not in lora.targets:
            continue
        if isinstance(module, ExpertBank):
            module.add_adapters(lora)
            continue
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, LoraLinear(child, lora))
