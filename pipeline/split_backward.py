"""A backward in two halves: first the gradient of the input, later those of the weights.

The rank before waits for the gradient of the input; nobody waits for the weights' (Qi et al. 2023, arXiv 2401.10241),
so a schedule may put them where a rank would be idle. Nothing is computed twice: the first half runs autograd down the
path to the input and notes, at every node where the path passes a matrix of weights, the gradient that arrives there;
the second half runs these nodes' other branches. Vectors (biases, the gains of norms) are cheap beside a second look
at the activations: they are done in the first half.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, _engine_run_backward, get_gradient_edge

Roots = Sequence[Tensor | GradientEdge]


def run_backward(
    roots: Roots, gradients: Sequence[Tensor], wanted: Roots = (), retain_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Run autograd from roots with these gradients: add to the parameters' `.grad`, or return those of what is wanted.

    What torch.autograd.backward and .grad do, without their check of the gradients' shapes, for which they import
    sympy: most of a second of every rank's start.
    """
    return _engine_run_backward(
        tuple(roots), tuple(gradients), retain_graph, False, tuple(wanted), True, accumulate_grad=not wanted
    )


@dataclass
class _Junction:
    """A node of the path to the input, and its branches to weights."""

    node: Node
    branches: list[GradientEdge]
    gradients: Sequence[Tensor | None] = field(default_factory=tuple)

    def note(self, gradients: Sequence[Tensor | None]) -> None:
        self.gradients = gradients


class SplitBackward:
    """The backward of y = f(x), whose graph leads to x and to parameters. Both must be floats; x is a leaf."""

    def __init__(self, y: Tensor, x: Tensor) -> None:
        self.y = y
        self.x = x
        self.junctions: list[_Junction] = []
        self.shared = False  # whether a weight gets gradients from several branches

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient of x. Those of vectors are added to their `.grad`."""
        small, self.junctions, self.shared = _branches(self.y, self.x)
        handles = [junction.node.register_prehook(junction.note) for junction in self.junctions]
        wanted = [get_gradient_edge(self.x), *small]
        of_x, *of_small = run_backward([self.y], [gradient], wanted, retain_graph=True)
        for handle in handles:
            handle.remove()
        _accumulate(small, of_small)
        assert of_x is not None
        return of_x

    def weight_gradients(self) -> None:
        """Add the gradients of the weights to their `.grad`."""
        edges: list[GradientEdge] = []
        gradients: list[Tensor | None] = []
        while self.junctions:
            junction = self.junctions.pop()
            arrived = [(GradientEdge(junction.node, i), g) for i, g in enumerate(junction.gradients) if g is not None]
            roots, given = zip(*arrived, strict=True)
            of_branches = run_backward(roots, given, junction.branches, retain_graph=True)
            if self.shared:  # all at once: what comes to one weight from several is summed as in a whole backward
                edges += junction.branches
                gradients += of_branches
            else:
                _accumulate(junction.branches, of_branches)
        _accumulate(edges, gradients)

    def held_bytes(self) -> int:
        """What is held from the first half to the second, beside what autograd keeps."""
        noted = [g for junction in self.junctions for g in junction.gradients if g is not None]
        return sum({g.untyped_storage()._cdata: g.untyped_storage().nbytes() for g in noted}.values())


def _accumulate(edges: Sequence[GradientEdge], gradients: Sequence[Tensor | None]) -> None:
    """Run autograd from these edges down to the parameters."""
    arrived = [(edge, g) for edge, g in zip(edges, gradients, strict=True) if g is not None]
    if arrived:
        roots, given = zip(*arrived, strict=True)
        run_backward(roots, given)


def _branches(y: Tensor, x: Tensor) -> tuple[list[GradientEdge], list[_Junction], bool]:
    """The edges that leave the path from y to x: those to vectors, and by junction those to matrices. Last, whether
    a matrix is reached in several ways.

    A branch that several nodes share (a tensor used twice) belongs to the first half, where autograd sums it.
    """
    target = get_gradient_edge(x).node
    order = list(_post_order(y.grad_fn))
    on_path = {target}
    matrices: set[Node] = set()  # branches that lead to a matrix
    parents: dict[Node, int] = {}
    for node in order:
        for child, _ in node.next_functions:
            if child is not None:
                if child in on_path:
                    on_path.add(node)
                if child in matrices:
                    matrices.add(node)
                parents[child] = parents.get(child, 0) + 1
        if (variable := getattr(node, "variable", None)) is not None and variable.dim() > 1:
            matrices.add(node)
    small, junctions = [], []
    for node in order:
        if node not in on_path or node is target:
            continue
        edges = [GradientEdge(c, nr) for c, nr in node.next_functions if c is not None and c not in on_path]
        large = [edge for edge in edges if edge.node in matrices and parents[edge.node] == 1]
        small += [edge for edge in edges if edge not in large]
        if large:
            junctions.append(_Junction(node, large))
    shared = any(parents[node] > 1 for node in matrices if hasattr(node, "variable"))
    return list(dict.fromkeys(small)), junctions, shared


def _post_order(root: Node | None) -> Iterator[Node]:
    """Every node below a root after all that it leads to."""
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
