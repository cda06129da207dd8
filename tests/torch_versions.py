"""Marks of tests that need what an older torch lacks. From torch 2.13 on, nothing is skipped."""

import pytest
import torch
import torch.nn.functional as F

needs_grouped_mm = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
needs_fsdp2_on_cpus = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU"
)
needs_fake_work = pytest.mark.skipif(
    not hasattr(torch._C._distributed_c10d, "FakeWork"), reason="this torch cannot imitate all exchanges"
)
needs_meta_send = pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("c10d::send", "Meta"),
    reason="this torch cannot send tensors of the meta device",
)

MARKS = (needs_grouped_mm, needs_fsdp2_on_cpus, needs_fake_work, needs_meta_send)
