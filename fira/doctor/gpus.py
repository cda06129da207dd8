"""Judge the facts about torch, driver, GPUs, NCCL and Triton."""

import re
import sys
from collections.abc import Sequence

from fira.doctor.device_probe import DeviceFacts, Gpu
from fira.doctor.finding import Finding, Level
from fira.doctor.limited_process import Outcome, run_limited

LIMIT_S = 120.0
OLDEST_TORCH = (2, 6)
INDEX = "https://download.pytorch.org/whl/"  # with one folder for each CUDA version, such as cu126
FREE_SHARE = 0.8  # a GPU with less free memory is in use by another program


def find_devices() -> tuple[DeviceFacts | None, Outcome]:
    """The facts, or None if the program that gathers them failed; and how that program ended."""
    outcome = run_limited((sys.executable, "-m", "fira.doctor.device_probe"), LIMIT_S)
    for facts in outcome.objects("torch"):
        return DeviceFacts(**facts | {"gpus": [Gpu(**gpu) for gpu in facts["gpus"]]}), outcome
    return None, outcome


def device_findings(facts: DeviceFacts | None, outcome: Outcome) -> list[Finding]:
    """All findings about torch and the GPUs. outcome: of the program that gathered the facts."""
    if facts is None and outcome.status is None:
        text = f"torch has not answered within {LIMIT_S:.0f} s"
        return [Finding("torch", text, Level.FATAL, "if nvidia-smi hangs as well, restart the driver or the machine")]
    if facts is None:
        text = f"cannot be imported: {outcome.last_lines(1) or f'status {outcome.status}'}"
        return [Finding("torch", text, Level.FATAL, "pip install torch")]
    findings = [torch_finding(facts), driver_finding(facts)]
    if facts.gpus:
        findings += [gpu_finding(i, gpu, facts.architectures) for i, gpu in enumerate(facts.gpus)]
        findings.append(triton_finding(facts))
    if len(facts.gpus) > 1:
        findings += [nccl_finding(facts), peer_finding(facts)]
    return [*findings, precision_finding(facts)]


def torch_finding(facts: DeviceFacts) -> Finding:
    text = f"{facts.torch}, {f'CUDA {facts.cuda}' if facts.cuda else 'built without CUDA'}"
    numbers = re.match(r"(\d+)\.(\d+)", facts.torch)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Finding("torch", f"{text}; too old", Level.FATAL, f'pip install "torch>={oldest}"')
    return Finding("torch", text)


def driver_finding(facts: DeviceFacts) -> Finding:
    """The NVIDIA driver compared with the CUDA version of torch. A driver runs all minor versions of its major one."""
    subject = "NVIDIA driver"
    if facts.driver is None and not facts.gpus:
        return Finding(subject, "none; training runs on the CPU")
    if facts.driver is None:
        return Finding(subject, "unknown")
    major, minor = facts.driver // 1000, facts.driver % 1000 // 10
    text = " ".join(filter(None, [facts.driver_release, f"supports CUDA {major}.{minor}"]))
    if facts.cuda is None:
        remedy = f"pip install --force-reinstall torch --index-url {INDEX}cu{major}{minor}, or a lower version there"
        return Finding(subject, f"{text}, but torch is built without CUDA", Level.PROBLEM, remedy)
    if major < int(facts.cuda.split(".")[0]):
        remedy = f"update the driver, or install torch for CUDA {major} from {INDEX}"
        return Finding(subject, f"{text}; too old for torch's CUDA {facts.cuda}", Level.PROBLEM, remedy)
    if facts.error:
        remedy = "run nvidia-smi; in a container, start it with --gpus all"
        return Finding(subject, f"{text}, but torch cannot use it: {facts.error}", Level.PROBLEM, remedy)
    if not facts.gpus:
        remedy = "check CUDA_VISIBLE_DEVICES and nvidia-smi; in a container, start it with --gpus all"
        return Finding(subject, f"{text}, but torch sees no GPU", Level.PROBLEM, remedy)
    return Finding(subject, f"{text}, torch needs {facts.cuda}")


def gpu_finding(index: int, gpu: Gpu, architectures: Sequence[str]) -> Finding:
    """Whether torch has kernels for a GPU, and whether its memory is free."""
    subject, capability = f"cuda:{index}", f"sm_{gpu.capability[0]}{gpu.capability[1]}"
    text = f"{gpu.name}, {capability}, {gpu.free / 1e9:.1f} of {gpu.total / 1e9:.1f} GB free"
    if not any(_runs(architecture, gpu.capability) for architecture in architectures):
        remedy = f"install a version of torch that supports {capability} from {INDEX}, or use --device cpu"
        built = ", ".join(architectures)
        return Finding(subject, f"{text}; torch has kernels for {built} only", Level.PROBLEM, remedy)
    if gpu.free < FREE_SHARE * gpu.total:
        return Finding(subject, f"{text}; in use", Level.PROBLEM, "nvidia-smi lists the programs that use it")
    return Finding(subject, text)


def _runs(architecture: str, capability: Sequence[int]) -> bool:
    """Whether kernels run on a GPU: sm_ on the same major version and equal or later minor, compute_ on all later."""
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)
    built = [int(parts[2]), int(parts[3])] if parts else [99]
    return built <= [*capability] and (architecture.startswith("compute") or built[0] == capability[0])


def triton_finding(facts: DeviceFacts) -> Finding:
    subject, slower = "Triton", "kernels are not fused, and training is slower"
    if facts.triton is None:
        return Finding(subject, f"not installed: {slower}", Level.PROBLEM, "pip install triton")
    if facts.compiler is None:
        text = f"{facts.triton}, but no C compiler, which it calls: {slower}"
        return Finding(subject, text, Level.PROBLEM, "install gcc, as with apt-get install gcc")
    return Finding(subject, f"{facts.triton}, compiler {facts.compiler}")


def nccl_finding(facts: DeviceFacts) -> Finding:
    if facts.nccl is None:
        text = "not in this build of torch: GPUs exchange tensors through MPI and host memory, which is slower"
        return Finding("NCCL", text, Level.PROBLEM, f"install torch from {INDEX}")
    return Finding("NCCL", facts.nccl)


def peer_finding(facts: DeviceFacts) -> Finding:
    """Which GPUs read each other's memory directly. Without it, transfers pass through host memory and still work."""
    count = len(facts.gpus)
    missing = [f"{i}–{j}" for i in range(count) for j in range(i + 1, count) if not facts.peers[i][j]]
    pairs = count * (count - 1) // 2
    if not missing:
        return Finding("peer access", "between all GPUs")
    text = "between no GPUs" if len(missing) == pairs else f"not between {', '.join(missing)}"
    return Finding("peer access", f"{text}; their transfers pass through host memory")


def precision_finding(facts: DeviceFacts) -> Finding:
    """The precision of the first device, which `--precision auto` selects for all ranks."""
    selected = facts.gpus[0].precision if facts.gpus else "fp32"
    return Finding("precision", f"auto selects {selected}{'; bf16 would be emulated' * (selected == 'fp16')}")
