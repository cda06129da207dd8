"""Split a backward pass into two parts: the gradient of the input first, the gradients of the weights later.

Only the gradient of the input is on the critical path of a pipeline: the previous stage waits for it. The weight
gradients can fill what would be a bubble (Qi et al. 2023, arXiv 2401.10241). No operation runs twice. The autograd
graph of y = f(x) = mm(mul(x, gain), weight), from outputs to inputs:

    y ──► mm ────► mul ────► x        [1] the path from y to x
          │        │                  [2] junction: a node of the path with a branch to a matrix (here mm)
          ▼ [3]    ▼ [4]              [3] a branch to a matrix
        weight    gain                [4] a branch to vectors only, such as a bias or the gain of a norm

    backward_input   runs autograd along [1] and [4], and saves the gradients that arrive at every junction [2]
    backward_weight  runs autograd from these saved gradients along [3]

[4] belongs to the first part because gradients of vectors are cheap, and computing them in the second part would
require keeping more activations. All branches of a function compiled by torch.compile count as [4] as well: it computes
all of its gradients at once, and the second part would compute them a second time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward, get_gradient_edge

Edges = Sequence[Tensor | GradientEdge]

COMPILED = "CompiledFunctionBackward"  # the name of the node of a compiled function


def run_backward(
    outputs: Edges, grad_outputs: Sequence[Tensor], inputs: Edges = (), retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Run autograd. Without inputs, add to the `.grad` of all parameters; with inputs, return their gradients instead.

    Equivalent to torch.autograd.backward and torch.autograd.grad. It calls the private function that both of them wrap,
    because their check of the gradients' shapes imports sympy, which takes most of a second when a rank starts.
    """
    return _engine_run_backward(
        tuple(outputs), tuple(grad_outputs), retain_graph, False, tuple(inputs), True, accumulate_grad=not inputs
    )


@dataclass
class _Junction:
    """[2] A node of the path with its branches to matrices, and the gradients of the node's outputs.

    shared_with: number of the first junction, counted from x, with a branch to a parameter of this junction's branches.
    """

    node: Node
    branches: list[GradientEdge]
    shared_with: int
    saved_for_weight_grad: Sequence[Tensor | None] = field(default_factory=tuple)

    def save(self, grads: Sequence[Tensor | None]) -> None:
        self.saved_for_weight_grad = grads


class SplitBackward:
    """The backward of y = f(x) in two parts. x is a leaf that requires a gradient, and y depends on it."""

    def __init__(self, y: Tensor, x: Tensor) -> None:
        self.y = y
        self.x = x
        self.junctions: list[_Junction] = []

    def backward_input(self, grad_output: Tensor) -> Tensor:
        """Return the gradient of x, and add the gradients of vectors to their `.grad`."""
        vector_edges, self.junctions = _find_branches(self.y, self.x)
        hooks = [junction.node.register_prehook(junction.save) for junction in self.junctions]  # [2]
        inputs = [get_gradient_edge(self.x), *vector_edges]
        grad_input, *vector_grads = run_backward([self.y], [grad_output], inputs, retain_graph=True)  # [1] [4]
        for hook in hooks:
            hook.remove()
        _accumulate(vector_edges, vector_grads)
        assert grad_input is not None
        return grad_input

    def backward_weight(self) -> None:
        """Add the gradients of the matrices to their `.grad`, freeing the saved gradients of each junction.

        The gradients of a matrix that is used several times are added at once, so that autograd sums them in the order
        of a full backward. A layer's gradients are complete before those of the layers below it arrive.
        """
        edges: list[GradientEdge] = []
        grads: list[Tensor | None] = []
        first = len(self.junctions)  # junction that shares a parameter with those that have been processed
        while self.junctions:
            junction = self.junctions.pop()
            saved = [(GradientEdge(junction.node, i), g) for i, g in enumerate(junction.saved_for_weight_grad)]
            outputs, grad_outputs = zip(*((edge, g) for edge, g in saved if g is not None), strict=True)
            branch_grads = run_backward(outputs, grad_outputs, junction.branches, retain_graph=True)  # [3]
            edges += junction.branches
            grads += branch_grads
            first = min(first, junction.shared_with)
            if first >= len(self.junctions):  # no remaining junction leads to the same parameters
                _accumulate(edges, grads)
                edges, grads = [], []


def _accumulate(edges: Sequence[GradientEdge], grads: Sequence[Tensor | None]) -> None:
    """Run autograd from edges with these gradients down to the parameters, skipping those without a gradient."""
    pairs = [(edge, g) for edge, g in zip(edges, grads, strict=True) if g is not None]
    if pairs:
        outputs, grad_outputs = zip(*pairs, strict=True)
        run_backward(outputs, grad_outputs)


def _find_branches(y: Tensor, x: Tensor) -> tuple[list[GradientEdge], list[_Junction]]:
    """Return the edges to vectors [4], and the junctions [2] with their branches [3] in order from x to y.

    A branch that several nodes share (a computed tensor that is used twice) counts as [4], so that autograd sums its
    gradients.
    """
    target = get_gradient_edge(x).node
    order = list(_post_order(y.grad_fn))
    on_path = {target}  # [1]
    leads_to_matrix: set[Node] = set()
    parents: dict[Node, int] = {}  # the number of edges into each node
    for node in order:
        for child, _ in node.next_functions:
            if child is not None:
                if child in on_path:
                    on_path.add(node)
                if child in leads_to_matrix:
                    leads_to_matrix.add(node)
                parents[child] = parents.get(child, 0) + 1
        if (variable := getattr(node, "variable", None)) is not None and variable.dim() > 1:
            leads_to_matrix.add(node)
    vector_edges: list[GradientEdge] = []
    junctions: list[_Junction] = []
    first: dict[Node, int] = {}  # parameter → number of the first junction with a branch to it
    for node in order:
        if node not in on_path or node is target:
            continue
        edges = [
            GradientEdge(child, nr) for child, nr in node.next_functions if child is not None and child not in on_path
        ]
        splits = node.name() != COMPILED
        matrix_edges = [e for e in edges if splits and e.node in leads_to_matrix and parents[e.node] == 1]  # [3]
        vector_edges += [edge for edge in edges if edge not in matrix_edges]  # [4]
        if matrix_edges:
            below = [n for edge in matrix_edges for n in _post_order(edge.node) if hasattr(n, "variable")]
            shared_with = min(first.setdefault(parameter, len(junctions)) for parameter in below)
            junctions.append(_Junction(node, matrix_edges, shared_with))  # [2]
    return list(dict.fromkeys(vector_edges)), junctions


def _post_order(root: Node | None) -> Iterator[Node]:
    """Every node of the graph below root, each after all nodes that it leads to."""
    seen = {root}
    stack = [(root, iter(root.next_functions))] if root else []
    while stack:
        node, children = stack[-1]
        for child, _ in children:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append((child, iter(child.next_functions)))
                break
        else:
            stack.pop()
            yield node
