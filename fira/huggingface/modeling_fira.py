"""The model families as transformers models.

The layers are those of `fira.models`. This file adds the interface of transformers: a cache that beam search can
reorder, batches with padding, the loss of labels, and named outputs. Exported folders contain this file and all project
files that it imports.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils import can_return_tuple

from fira.huggingface.configuration_fira import FiraLMConfig, RishAIConfig
from fira.huggingface.padding import starts_and_ends
from fira.models.registry import FAMILIES, build, from_document
from fira.nn.context import Context
from fira.nn.init import initial_values
from fira.nn.kv_cache import KVCache
from fira.nn.moe.router import Routed, Router

# The argument and the output that hold the cache; transformers 5.24 has renamed both.
CACHE = "cache" if "cache" in MoeModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class FiraLMCache(Cache):
    """A KVCache with the interface of transformers' caches.

    `crop` raises ValueError if the model has a recurrent state, or a window of attention has passed the removed tokens.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.kv_cache = KVCache()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.kv_cache.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kv_cache.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kv_cache.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = next(iter(self.kv_cache.states.values())).shape[0]
        self.kv_cache.select(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.kv_cache.crop(self.kv_cache.length - abs(tokens_to_remove))

    def reset(self) -> None:
        self.kv_cache = KVCache()


@dataclass
class FiraLMOutput(MoeModelOutputWithPast):
    """aux_loss: sum of the auxiliary losses of all layers, multiplied by their coefficients."""

    aux_loss: Tensor | None = None


class FiraLMPreTrainedModel(PreTrainedModel):
    """Settings for transformers that the base model and the causal language model share."""

    config: FiraLMConfig
    config_class = FiraLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = {"Block"}  # noqa: RUF012 (the type is given by transformers)
    _skip_keys_device_placement = {"past_key_values", "cache"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True  # by torch's kernel for scaled_dot_product_attention, which all names select

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As in transformers. Raises ValueError if the model has value embeddings, which are not resized."""
        if self.config.shape.get("value_embeddings"):
            raise ValueError("a model with value_embeddings cannot be resized")
        return super().resize_token_embeddings(*args, **kwargs)


class FiraLMModel(FiraLMPreTrainedModel):
    """Embedding, blocks and final norm of a model. It also contains the projection to logits but does not apply it."""

    def __init__(self, config: FiraLMConfig) -> None:
        super().__init__(config)
        device = torch.get_default_device()
        with torch.device("meta"):
            # The config is rebuilt, because with remote code it may belong to another copy of the family's module.
            model = build(from_document(config.shape))
        # DeepSpeed's zero.Init has already created the weights, and sharded them.
        on_meta = next(model.parameters()).is_meta
        self.layers = model.layers.to_empty(device=device) if on_meta and device.type != "meta" else model.layers
        self.gradient_checkpointing = False
        last = len(self.layers) - 1
        if model.tied:
            self._tied_weights_keys = {f"layers.{last}.project.weight": "layers.0.token.weight"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Set the initial values of training. transformers calls this for modules whose weights were not loaded."""
        path = next((path for path, other in self.named_modules() if other is module), None)
        if path is None:  # a resized embedding that is not yet part of the model
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
        cache: FiraLMCache | None = None,
        **kwargs: Any,
    ) -> FiraLMOutput:
        """input_ids [B, T], or inputs_embeds [B, T, d] instead of token embeddings → hidden states [B, T, d].

        attention_mask: [B, past + T], one for tokens and zero for padding, which is allowed before and after them.
        output_attentions: return the probabilities [B, H, T, past + T] of each attention layer.
        output_router_logits: return the router logits [B · T, E] of each MoE layer. cache: see CACHE.

        Raises ValueError for other masks, for position_ids, and if both or neither of the inputs are given.
        """
        x = input_ids if inputs_embeds is None else inputs_embeds
        if x is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if kwargs.get("position_ids") is not None:
            raise ValueError("positions follow from attention_mask; position_ids cannot be given")
        config = self.config
        return_attentions = config.output_attentions if output_attentions is None else output_attentions
        return_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return_routers = config.output_router_logits if output_router_logits is None else output_router_logits
        use_cache = config.use_cache if use_cache is None else use_cache
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache and not self.training:
            cache = FiraLMCache()

        context = self._context(x, attention_mask, cache, return_attentions, return_routers)
        embedding, *blocks, head = self.layers
        x = embedding(x, context)
        hidden, aux_losses = [x], list[Tensor]()
        with _router_logits(self if return_routers else nn.Identity()) as routers:
            for index, block in enumerate(blocks, 1):
                if self.gradient_checkpointing and self.training:
                    x, aux = self._gradient_checkpointing_func(_run_block, index, block, x, context)
                else:
                    x, aux = _run_block(index, block, x, context)
                hidden.append(x)
                if aux is not None:
                    aux_losses.append(aux)
        x = head.get_submodule("norm")(x)
        if cache is not None:
            cache.kv_cache.length += x.shape[1]
        attentions = context.decoding.attentions
        return FiraLMOutput(
            last_hidden_state=x,
            hidden_states=(*hidden[:-1], x) if return_hidden else None,
            attentions=None if attentions is None else tuple(attentions.values()),
            router_logits=tuple(routers) if return_routers else None,  # type: ignore[arg-type]
            aux_loss=sum((aux.to(x.device) for aux in aux_losses), x.new_zeros(())) if aux_losses else None,
            **{CACHE: cache},
        )

    def _context(
        self, x: Tensor, mask: Tensor | None, cache: FiraLMCache | None, attentions: bool, routers: bool
    ) -> Context:
        """The context of inputs x. attentions, routers: whether to store attention probabilities and router logits."""
        context = Context.for_tokens(x, self.training)
        context.training.caller_adds_aux = True
        context.tokens = None if x.is_floating_point() else x
        context.decoding.cache = None if cache is None else cache.kv_cache
        context.decoding.attentions = {} if attentions else None
        if mask is not None:
            context.starts, context.lengths = starts_and_ends(mask)
        if self.training or routers:
            tokens = context.valid(x).sum(1)
            context.training.aux_weights = tokens / tokens.sum().clamp(min=1)
        return context


class FiraLMForCausalLM(FiraLMPreTrainedModel, GenerationMixin):
    """Causal language model of any family: FiraLMModel and the projection to logits."""

    def __init__(self, config: FiraLMConfig) -> None:
        super().__init__(config)
        self.model = FiraLMModel(config)
        self.loss_type = "ForCausalLM"
        self._is_stateful = FAMILIES[config.shape["family"]].recurrent
        self.post_init()

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Use a FiraLMCache for generation, unless `use_cache` is false or a cache is given."""
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = FiraLMCache()

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
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Arguments and outputs of FiraLMModel, and logits [B, T, vocab].

        kwargs: other arguments of FiraLMModel and of the loss function, such as shift_labels [B, T], the next tokens.
        logits_to_keep: number of last tokens whose logits are computed, or their indices; 0: all. labels: [B, T], the
        input tokens; −100 for tokens that are not predicted. `loss` is the mean cross-entropy of the predicted tokens.
        In train mode it includes the auxiliary loss, whose weight does not depend on the accumulation steps.
        """
        kwargs["output_router_logits"] = output_router_logits
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.layers[-1].logits(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            if self.training and outputs.aux_loss is not None:
                batch_tokens = kwargs.get("num_items_in_batch")  # of all accumulation steps
                targets = labels[:, 1:] if kwargs.get("shift_labels") is None else kwargs["shift_labels"]
                share = 1 if batch_tokens is None else (targets != -100).sum() / batch_tokens
                loss = loss + share * outputs.aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: getattr(outputs, CACHE)},
        )


class RishAIModel(FiraLMModel):
    """Base model of rish, under the name that is used by Rish AI."""

    config_class = RishAIConfig


class RishAICausalLM(FiraLMForCausalLM):
    """Causal language model of rish, under the name that is used by Rish AI."""

    config_class = RishAIConfig


def _run_block(index: int, block: nn.Module, x: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """x [B, T, d] → output [B, T, d] of the block `layers[index]` and its auxiliary loss, None if it has no experts.

    Both are returned, because checkpointing with `use_reentrant` differentiates nothing else.
    """
    x = block(x, context)
    stats = context.training.stats.get((index, 0))
    return x, None if stats is None else stats.aux


@contextmanager
def _router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Context manager that yields a list, to which each router in `model` appends its logits [N, E]."""
    logits: list[Tensor] = []

    def append_logits(module: nn.Module, inputs: Any, routed: Routed) -> None:
        logits.append(routed.logits)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, Router):
                hooks.enter_context(module.register_forward_hook(append_logits))
        yield logits
