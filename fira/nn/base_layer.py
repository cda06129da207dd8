"""Base class of the layers of a language model: a module called as `layer(x, context)` that reports its FLOPs."""

from torch import nn


class Layer(nn.Module):
    """One entry of `LanguageModel.layers`.

    compilable: names of methods whose tensors have the same shapes in every micro-batch, and which therefore can be
    compiled (`fira.parallel.compile_blocks`).
    """

    compilable: tuple[str, ...] = ()

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs per token in sequences of `length`: all Linears, and modules with `own_flops_per_token`."""
        total = 0.0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                total += 2.0 * module.in_features * module.out_features
            elif own := getattr(module, "own_flops_per_token", None):
                total += own(length)
        return total
