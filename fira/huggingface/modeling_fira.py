"""The families as transformers' models. This file goes into exported folders, with all that it imports.

The layers are the ones that are trained; here they get what transformers asks of a model: a cache that beams can
reorder, batches padded on the left, a loss from labels, outputs by name.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from fira.huggingface.configuration_fira import FiraLMConfig, RishAIConfig
from fira.models.registry import FAMILIES, build, from_document
from fira.nn.context import Context
from fira.nn.init import initial_values
from fira.nn.kv_cache import KVCache
from fira.nn.moe.router import Routed, Router


class FiraLMCache(Cache):
    """A KVCache as transformers' generation handles it. A recurrent state cannot be shortened, nor a passed window."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kept = KVCache()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kept.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kept.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kept.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next(iter(self.kept.states.values())).shape[0]
        self.kept.select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.kept.crop(self.kept.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.kept = KVCache()


@dataclass
class FiraLMOutput(MoeModelOutputWithPast):
    """aux_loss: what the layers add to the training loss, coefficients included."""

    aux_loss: Tensor | None = None


class FiraLMPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config: FiraLMConfig
    config_class = FiraLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = {"Block"}  # noqa: RUF012 (transformers says what it is)
    _skip_keys_device_placement = {"past_key_values"}  # noqa: RUF012
    _supports_sdpa = True


class FiraLMModel(FiraLMPreTrainedModel):
    """A family's embedding and blocks, and the norm behind them. The projection to logits is there and not used."""

    def __init__(self, config: FiraLMConfig) -> None:
        super().__init__(config)
        device = torch.get_default_device()
        with torch.device("meta"):
            model = build(from_document(config.shape))  # of remote code each file's classes are its own, so not .own()
        self.layers = model.layers if device.type == "meta" else model.layers.to_empty(device=device)
        self.gradient_checkpointing = False
        last = len(self.layers) - 1
        if model.tied:
            self._tied_weights_keys = {f"layers.{last}.project.weight": "layers.0.token.weight"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As training starts; only for what is not in the folder that is loaded."""
        path = next((path for path, other in self.named_modules() if other is module), None)
        if path is None:  # the larger table that takes an embedding's place
            return super()._init_weights(module)
        for tensor, value in initial_values(module, path, seed=0):
            init.copy_(tensor, value)
        return None

    def get_input_embeddings(self) -> nn.Module:
        return self.layers.get_submodule("0.token")

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.layers[0].register_module("token", value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FiraLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> FiraLMOutput:
        """input_ids [B, T], or inputs_embeds [B, T, d] in place of the tokens' vectors → the last hidden states.

        attention_mask: [B, past + T], ones for tokens; zeros before and behind them, not between. ValueError otherwise.
        output_attentions: probabilities, [B, H, T, past + T] for each attention in the order of the layers.
        output_router_logits: [B · T, E] for each layer that has experts.
        """
        x = input_ids if inputs_embeds is None else inputs_embeds
        if x is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("position_ids") is not None:
            raise ValueError("positions follow from attention_mask; position_ids cannot be given")
        config = self.config
        wants_attentions = config.output_attentions if output_attentions is None else output_attentions
        wants_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        wants_routers = config.output_router_logits if output_router_logits is None else output_router_logits
        caches = config.use_cache if use_cache is None else use_cache
        if past_key_values is None and caches and not self.training:
            past_key_values = FiraLMCache()

        context = Context.for_tokens(x, self.training)
        training, decoding = context.training, context.decoding
        training.caller_adds_aux = True
        decoding.cache = None if past_key_values is None else past_key_values.kept
        decoding.attentions = {} if wants_attentions else None
        if attention_mask is not None:
            context.starts, context.lengths = _edges(attention_mask)
        if self.training or wants_routers:
            tokens = context.valid(x).sum(1)
            training.aux_weights = tokens / tokens.sum().clamp(min=1)

        hidden = []
        *body, head = self.layers
        with _router_logits(self if wants_routers else nn.Identity()) as routers:
            for layer in body:
                if self.gradient_checkpointing and self.training:
                    x = self._gradient_checkpointing_func(layer.__call__, x, context)
                else:
                    x = layer(x, context)
                hidden.append(x)
        x = head.get_submodule("norm")(x)
        if decoding.cache is not None:
            decoding.cache.length += x.shape[1]
        notes = training.stats.values()
        return FiraLMOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*hidden[:-1], x) if wants_hidden else None,
            attentions=tuple(decoding.attentions.values()) if decoding.attentions is not None else None,
            router_logits=tuple(routers) if wants_routers else None,  # type: ignore[arg-type]
            aux_loss=sum((note.aux.to(x.device) for note in notes), x.new_zeros(())) if notes else None,
        )


class FiraLMForCausalLM(FiraLMPreTrainedModel, GenerationMixin):
    """A family's model with its logits."""

    def __init__(self, config: FiraLMConfig) -> None:
        super().__init__(config)
        self.model = FiraLMModel(config)
        self.loss_type = "ForCausalLM"
        self._is_stateful = FAMILIES[config.shape["family"]].recurrent
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Where generation is to start with a cache, it is one of ours."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = FiraLMCache()

    def get_output_embeddings(self) -> nn.Module:
        return self.model.layers[-1].get_submodule("project")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.model.layers[-1].register_module("project", new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: FiraLMCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """As FiraLMModel's, and logits [B, T, vocab]; of the last `logits_to_keep` tokens, where it is not 0.

        labels: [B, T], the tokens themselves, −100 for what is not to be predicted. `loss` is then the mean over
        predicted tokens, in train mode with the auxiliary loss, which weighs as much however a batch is accumulated.
        """
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_attentions,
            output_hidden_states,
            output_router_logits,
            position_ids=kwargs.pop("position_ids", None),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and outputs.aux_loss is not None:
                of_all = kwargs.get("num_items_in_batch")  # predicted tokens, where this is a part of a batch
                share = 1 if of_all is None else (labels[:, 1:] != -100).sum() / of_all
                loss = loss + share * outputs.aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class RishAIModel(FiraLMModel):
    """rish under the name that its README gives it."""

    config_class = RishAIConfig


class RishAICausalLM(FiraLMForCausalLM):
    """rish under the name that its README gives it."""

    config_class = RishAIConfig


def _edges(mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """[B, T] of ones and zeros → where each row's ones start and where they end, each None where it is all the same."""
    if mask.dim() != 2:
        raise ValueError(f"attention_mask has {mask.dim()} dimensions; give [batch, tokens]")
    ones = mask.bool()
    if ones.all():
        return None, None
    starts = ones.int().argmax(1)
    ends = starts + ones.sum(1)
    places = torch.arange(mask.shape[1], device=mask.device)
    if not torch.equal(ones, (places >= starts[:, None]) & (places < ends[:, None])):
        raise ValueError(
            "attention_mask has a zero between ones; padding is before and behind a sequence. Where a prompt holds the "
            "padding token, give generate() the mask"
        )
    return starts if starts.any() else None, None if ones[:, -1].all() else ends


@contextmanager
def _router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the routers of a model decide by, as long as the context lasts."""
    logits: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, routed: Routed) -> None:
        logits.append(routed.logits)

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()
