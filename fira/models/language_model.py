"""Base class of all model families: a sequence of layers, from embedding over blocks to head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fira.decoding.decoding import continuation
from fira.decoding.sampling import Sampling
from fira.nn.context import Context
from fira.nn.embedding import Embedding, Head
from fira.nn.init import initialise
from fira.nn.lora import Lora
from fira.nn.quantization import Quantization

EXPORT_PREFIX = "model."  # of the names in an export, where the model is a part of the class of transformers


class LanguageModel(nn.Module):
    """Language model with `layers[0]` the embedding and `layers[-1]` the head; each is called as `layer(x, context)`.

    A parameter's name, such as `layers.3.moe.experts.w1`, is the same in every layout. On the meta device the model has
    no weights.

    config: dataclass of the family, with the fields `vocab_size` and `seq_len`, the longest context.
    tied: the head shares the embedding's weight. The parameter is listed once, under the embedding's name.
    lora: settings of its adapters, if `fira.models.adapters` has added any.
    quantization: settings of its quantised matrices, if `fira.models.quantized_model` has made any.
    tokenizer, tokenizer_config: attributes that are set if the model is loaded together with a tokenizer; the latter
    has the names of its special tokens and its chat template.
    """

    def __init__(self, config: Any, layers: nn.Sequential, tied: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layers = layers
        self.tied = tied
        self.lora: Lora | None = None
        self.quantization: Quantization | None = None
        self.tokenizer: Any = None
        self.tokenizer_config: Any = None
        self.register_load_state_dict_pre_hook(_from_export)
        if next(self.parameters()).device.type != "meta":
            for index, layer in enumerate(layers):
                initialise(layer, f"layers.{index}", seed=0)
        self.tie()

    def tie(self) -> None:
        """Share the embedding's weight with the head if the model is tied. Call it after one of them was replaced."""
        if self.tied:
            embedding, head = self.layers[0], self.layers[-1]
            assert isinstance(embedding, Embedding)
            assert isinstance(head, Head)
            head.project.weight = embedding.token.weight

    def forward(self, tokens: Tensor, context: Context | None = None) -> Tensor:
        """tokens [B, T] int64 → logits [B, T, vocab]. Without a context, torch's generator seeds dropout."""
        context = context or Context.for_tokens(tokens, self.training)
        context.tokens = x = tokens
        for layer in self.layers:
            x = layer(x, context)
        if context.decoding.cache is not None:
            context.decoding.cache.length += tokens.shape[1]
        return x

    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers by global name, as stored in a checkpoint. A tied parameter is listed once."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def num_parameters(self) -> int:
        """Total number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def generate(
        self,
        ids: Sequence[int] | Sequence[Sequence[int]] | Tensor,
        max_new_tokens: int = 100,
        eos: int | None = None,
        use_cache: bool = True,
        **sampling: Any,
    ) -> list[list[int]] | Tensor:
        """Continue one or several prompts; returns prompts and continuations.

        ids: a list of tokens, which is a batch of one as in `generate(encode(text))[0].tolist()`: returns a tensor
            [1, T]; a list of such lists of any lengths: returns lists; or a tensor [T] or [B, T]: returns a tensor.
        eos: token that ends a sequence. If the result is a tensor, shorter rows are padded with it.
        use_cache: keep keys, values and states; False recomputes all tokens at each step, with the same result.
        sampling: temperature (0: greedy), top_k, top_p, seed and the other fields of `fira.decoding.sampling.Sampling`.

        Of texts longer than the model's context, the last tokens are used. Raises UserError if a prompt is empty or
        contains a token outside the vocabulary, or if an option is out of range.
        """
        listed = not isinstance(ids, Tensor) and any(hasattr(prompt, "__len__") for prompt in ids)
        rows: list[Any] = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        batched = listed or (isinstance(ids, Tensor) and ids.dim() == 2)
        texts = [list(row) for row in (rows if batched else [rows])]
        prompts = [tuple(text) for text in texts]
        for new in continuation(self, prompts, max_new_tokens, Sampling(**sampling), eos, use_cache):
            for row, token in new.items():
                texts[row].append(token)
        if listed:
            return texts
        longest = max(map(len, texts))
        padded = torch.tensor([text + [eos or 0] * (longest - len(text)) for text in texts])
        if isinstance(ids, Tensor):
            return padded.to(ids.device) if batched else padded[0].to(ids.device)
        return padded


def _from_export(model: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Hook of `load_state_dict` for the weights of an export: removes the prefix, and adds the head of a tied model."""
    assert isinstance(model, LanguageModel)
    if state_dict and all(name.startswith(EXPORT_PREFIX) for name in state_dict):
        for name in list(state_dict):
            state_dict[name.removeprefix(EXPORT_PREFIX)] = state_dict.pop(name)
        if model.tied:
            state_dict.setdefault(f"layers.{len(model.layers) - 1}.project.weight", state_dict["layers.0.token.weight"])
