"""Products of one row or several with matrices in reduced precision, by the kernels that torch and ONNX Runtime have.

    python -m benchmarks.quantization.products [rows]

The matrices exceed the caches. For ONNX Runtime: pip install onnxruntime onnx; it is omitted without them.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import alternate, environment, ratio
from fira.nn.quantized_matrix import Int4Matrix, Int8Matrix
from fira.nn.row_linear import RowLinear

OUT, IN, COUNT, ROUNDS = 3072, 768, 60, 9
Contender = tuple[str, Callable[[Any], Tensor], list[Any]]  # name, product with one of the matrices, these


def torch_contenders(weights: list[Tensor], x: Tensor) -> Iterator[Contender]:
    bias = torch.zeros(OUT)
    yield "fp32, linear", lambda w: F.linear(x, w), weights
    linears = []
    for weight in weights:
        linears.append(RowLinear(nn.Linear(IN, OUT, bias=False, device="meta")))
        linears[-1].weight = nn.Parameter(weight)
    yield "fp32, RowLinear", lambda layer: layer(x), linears
    yield "bf16, linear", lambda w: F.linear(x.bfloat16(), w), [w.bfloat16() for w in weights]
    halves = [torch.fbgemm_pack_gemm_matrix_fp16(w) for w in weights]
    yield "fp16, FBGEMM", lambda w: torch.fbgemm_linear_fp16_weight_fp32_activation(x, w, bias), halves
    eights = [Int8Matrix(w) for w in weights]
    yield "int8, Int8Matrix", lambda m: m(x.bfloat16()).float(), eights
    scales = [m.scale.float() for m in eights]
    pairs = [(m.q, scale) for m, scale in zip(eights, scales, strict=True)]
    yield "int8, the same kernel in fp32", lambda p: torch.ops.aten._weight_int8pack_mm(x, *p), pairs
    yield "int4, Int4Matrix", lambda m: m(x.bfloat16()).float(), [Int4Matrix(w) for w in weights]
    zeros = torch.zeros(OUT, dtype=torch.int64)
    packed = [torch._make_per_channel_quantized_tensor(m.q, s, zeros, 0) for m, s in zip(eights, scales, strict=True)]
    fbgemm = [torch.ops.quantized.linear_prepack(w, None) for w in packed]
    yield "int8 and 8-bit rows, FBGEMM", lambda w: torch.ops.quantized.linear_dynamic(x, w), fbgemm
    onednn = [(torch.ops.onednn.qlinear_prepack(m.q, list(x.shape)), s) for m, s in zip(eights, scales, strict=True)]

    def qlinear(pair: tuple[Tensor, Tensor]) -> Tensor:
        step = float(x.abs().max()) / 127
        q = (x / step + 128).round_().clamp_(0, 255).to(torch.uint8)
        arguments = (None, 1.0, 0, torch.float32, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise(q, step, 128, pair[0], pair[1], zeros, *arguments)

    yield "int8 and 8-bit rows, oneDNN", qlinear, onednn


def onnx_contenders(weights: list[Tensor], x: Tensor) -> Iterator[Contender]:
    """MatMulNBits with rows in 8 bits (accuracy_level 4): one session per matrix, with one thread."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    feed = {"x": x.numpy()}
    for bits, group in ((8, 128), (4, 32)):
        sessions = []
        for weight in weights:
            groups, half = weight.view(OUT, -1, group), 2 ** (bits - 1)
            scale = groups.abs().amax(2) / (half - 1)
            q = ((groups / scale[..., None]).round() + half).to(torch.uint8)
            q = q if bits == 8 else q[..., 1::2] * 16 + q[..., ::2]
            tensors = [onnx.numpy_helper.from_array(t.contiguous().numpy(), n) for t, n in ((q, "q"), (scale, "s"))]
            sizes = {"K": IN, "N": OUT, "bits": bits, "block_size": group, "accuracy_level": 4}
            node = onnx.helper.make_node("MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", **sizes)
            ends = [onnx.helper.make_tensor_value_info(n, 1, ["m", w]) for n, w in (("x", IN), ("y", OUT))]
            graph = onnx.helper.make_graph([node], "product", ends[:1], ends[1:], tensors)
            opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
            model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
            sessions.append(onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
        yield f"int{bits} and 8-bit rows, ONNX Runtime", lambda s: torch.from_numpy(s.run(None, feed)[0]), sessions


@torch.inference_mode()
def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    torch.manual_seed(0)
    weights, x = [torch.randn(OUT, IN) / 50 for _ in range(COUNT)], torch.randn(rows, IN)
    contenders = [*torch_contenders(weights, x), *onnx_contenders(weights, x)]
    exact = x.double() @ weights[0].double().T
    errors = {
        name: float((product(items[0]).double() - exact).norm() / exact.norm()) for name, product, items in contenders
    }
    calls = {
        name: lambda product=product, items=items: [product(item) for item in items]
        for name, product, items in contenders
    }
    seconds = alternate(calls, ROUNDS)
    print(f"{rows} rows, {OUT} × {IN}\n| product | µs | ratio | error |\n|---|---|---|---|")
    for name, times in seconds.items():
        speed = ratio(seconds["fp32, linear"], times)
        print(f"| {name} | {1e6 * statistics.median(times) / COUNT:.0f} | {speed:.1f} | {errors[name]:.2%} |")
    print(environment())


if __name__ == "__main__":
    main()
