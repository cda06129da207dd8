"""The shards of a rank, and with --shard parameters the layers whose parameters it divides with its replicas."""

from torch import nn

from fira.models.language_model import LanguageModel
from fira.nn.moe.experts import ExpertBank
from fira.parallel.layer_weights import LayerWeights, divide_layer
from fira.parallel.param_shard import GlobalTensor, ParamShard, find_owners, replica_rank
from pipeline.mesh import Mesh

TABLE = "layers.0.token.weight"  # the embedding, which the head of a tied model shares


class RankShards:
    """This rank's shards of the tensors of its layers, which are added one after another.

    parameters: of the whole model, those that are trained. The other attributes are those of `DistributedModel`.
    """

    def __init__(self, model: LanguageModel, mesh: Mesh, shard: str | None, layers: set[int]) -> None:
        self.parameters, frozen = _parameters(model, trained=True), _parameters(model, trained=False)
        self.trained: list[ParamShard] = []
        self.frozen: list[ParamShard] = []
        self.buffers: list[ParamShard] = []
        self.weights: dict[int, LayerWeights] = {}
        buffers = [GlobalTensor(name, tuple(b.shape), False) for name, b in model.named_buffers()]
        self._lists = [(self.parameters, self.trained), (frozen, self.frozen)]
        self._lists.append((buffers, self.frozen if model.lora else self.buffers))
        self._mesh, self._table = mesh, TABLE if model.tied else None
        self._divides = shard == "parameters" and mesh.layout.dp > 1
        self._owners: dict[str, int] = {}
        for tensors in (self.parameters, frozen):
            own = [tensor for tensor in tensors if tensor.layer in layers]
            self._owners |= find_owners(own, mesh, shard, self._table)

    def add(self, index: int, layer: nn.Module) -> None:
        """Add a layer with its initial weights, of which only those that this rank owns may be kept."""
        own = []
        for tensors, shards in self._lists:
            added = [self._shard(tensor, layer) for tensor in tensors if tensor.layer == index]
            shards += added
            own += [shard for shard in added if shard.name in self._owners and shard.name != self._table]
        if self._divides:
            self.weights[index] = divide_layer(layer, own, self._mesh)

    def _shard(self, tensor: GlobalTensor, layer: nn.Module) -> ParamShard:
        name, shape, expert = tensor
        module, _, attribute = name.split(".", 2)[2].rpartition(".")
        leaf = parameter = getattr(layer.get_submodule(module), attribute)
        if expert and self._mesh.separates_sources:
            parameter = nn.Parameter(leaf.detach()[0])
        start = self._mesh.ep_rank * len(parameter) if expert else 0
        owner = self._owners.get(name, 0)
        kept = not self._divides or name not in self._owners or owner == replica_rank(self._mesh, expert)
        return ParamShard(name, parameter, start, shape, expert, leaf, owner, kept)


def _parameters(model: nn.Module, trained: bool) -> list[GlobalTensor]:
    """The parameters of the whole model that are trained, or those that are frozen."""
    banks = ((path, module) for path, module in model.named_modules() if isinstance(module, ExpertBank))
    experts = {f"{path}.{name}" for path, bank in banks for name, _ in bank.named_parameters(recurse=False)}
    return [
        GlobalTensor(name, tuple(p.shape), name in experts)
        for name, p in model.named_parameters()
        if p.requires_grad == trained
    ]
