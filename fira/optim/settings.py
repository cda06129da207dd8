"""Settings of the optimizer."""

from dataclasses import dataclass

OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True)
class OptimizerSettings:
    """Names and defaults are those of the flags of train.py.

    optimizer: "adamw", or "muon" for the matrices of the blocks. weight_decay: of matrices other than embeddings.
    cautious_decay: of those elements of a matrix that the update moves towards zero only. embedding_lr_scale,
    router_lr_scale: factors of the learning rate, for embeddings of tokens and for routers.
    """

    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    cautious_decay: bool = False
    embedding_lr_scale: float = 1.0
    router_lr_scale: float = 1.0
