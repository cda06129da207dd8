"""Load the kernels of a model before its first messages."""

import torch
import torch.distributed as dist

from fira.parallel.parallelize import DistributedModel
from pipeline.engine import MicroBatch
from pipeline.mesh import Mesh


class KernelLoading:
    """Runs this rank's stages once before their first messages over NCCL.

    When CUDA loads a kernel, it may wait for all running kernels. A receive that was posted ahead is one of them, and
    the message that it waits for may depend on this rank. CUDA_MODULE_LOADING=EAGER loads the kernels of libraries at
    the start, but not those of Triton and torch.compile.
    """

    def __init__(self, model: DistributedModel, mesh: Mesh) -> None:
        self._model = model
        self.needed = dist.get_backend(mesh.groups["dp"]) == "nccl" and mesh.layout.pp > 1
        self._loaded: set[tuple[bool, type]] = set()  # whether in training, and the objective

    def load(self, microbatch: MicroBatch, training: bool) -> None:
        """Run the stages on a micro-batch, with their backward in training, at the first call with its objective."""
        kernels = training, type(microbatch.context.training.objective)
        if not self.needed or kernels in self._loaded:
            return
        self._loaded.add(kernels)
        with torch.set_grad_enabled(training):
            self._model.engine.run_stages(microbatch)
        tied = self._model.tied
        if tied and tied.copy is not None:
            tied.copy.grad = None  # GradientSum clears the others
