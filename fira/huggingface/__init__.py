"""The model families as transformers models.

Importing this package registers them with the Auto classes, and adds the classes of Rish AI to the names of
transformers, from which its document imports them.
"""

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from fira.huggingface.configuration_fira import FiraLMConfig, RishAIConfig
from fira.huggingface.modeling_fira import FiraLMForCausalLM, FiraLMModel, RishAICausalLM, RishAIModel

__all__ = ["FiraLMConfig", "FiraLMForCausalLM", "FiraLMModel", "RishAICausalLM", "RishAIConfig", "RishAIModel"]

for _config, _base, _causal in (
    (FiraLMConfig, FiraLMModel, FiraLMForCausalLM),
    (RishAIConfig, RishAIModel, RishAICausalLM),
):
    AutoConfig.register(_config.model_type, _config)
    AutoModel.register(_config, _base)
    AutoModelForCausalLM.register(_config, _causal)
for _class in (RishAIConfig, RishAIModel, RishAICausalLM):
    setattr(transformers, _class.__name__, _class)
