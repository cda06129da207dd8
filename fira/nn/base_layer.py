"""What every layer of a language model is: a module called as `layer(x, context)` that can say what it costs."""

from torch import nn


class Layer(nn.Module):
    """One entry of `LanguageModel.layers`."""

    def flops_per_token(self, length: int) -> float:
        """Forward FLOPs per token in sequences of `length`: of all Linears, and what other modules add of their own."""
        total = 0.0
        for module in self.modules():
            if isinstance(module, nn.Linear):
                total += 2.0 * module.in_features * module.out_features
            elif own := getattr(module, "own_flops_per_token", None):
                total += own(length)
        return total
