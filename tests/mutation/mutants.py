"""Cosmic Ray's mutants of a module and what identifies each of them.

Left out, because they are equivalent, duplicates or not specified:
- annotations, type aliases, raised errors, whose texts are not specified, and lines marked `pragma: no mutate`;
- all but one replacement of each binary operator and of `is` and `is not`; identity in place of an order;
- `frozen=True` of dataclasses and `strict=True` of zip, which forbid what no caller does;
- a second mutant with the same constants: +1 and 1 for −1, or ~1 and −2.
No operator mutates strings.
"""

import ast
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.ast.ast_query import ASTQuery
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

EXCLUDED = ("core/NoOp", "core/VariableReplacer", "core/VariableInserter")  # no change; or they need arguments
# One replacement per operator suffices where the tests tell the operators apart. Without this list every `+` has
# eleven mutants, most of which raise a TypeError and are caught by any test that runs the line.
REPLACEMENTS = {
    "Add": "Sub", "Sub": "Add", "Mul": "Div", "Div": "Mul", "FloorDiv": "Mul", "Mod": "FloorDiv", "Pow": "Mul",
    "BitOr": "BitAnd", "BitAnd": "BitOr", "BitXor": "BitAnd", "RShift": "LShift", "LShift": "RShift",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A mutated module. definition, before, after identify it in equivalent.toml; line: for the report."""

    definition: str
    before: str
    after: str
    line: int
    operator: str
    code: str


def mutants(path: Path) -> list[Mutant]:
    """All mutants of a module but those that the filters below exclude, in the order of their lines."""
    source = path.read_text(encoding="utf-8")
    ignored, tree = _ignored_lines(source), get_ast(source)
    original = _program(source)
    found: dict[str, Mutant] = {}  # by program, since two operators may give the same
    for name in operator_names():
        if name in EXCLUDED or not _is_representative(name):
            continue
        operator = get_operator(name)()
        places = [(node, start) for node in ast_nodes(tree) for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(places):
            code = None if start[0] in ignored else mutate_code(source, operator, occurrence)
            program = original if code is None else _program(code)
            if code is None or program in (original, "") or program in found:
                continue
            before, after, line = _first_difference(source, code)
            definition = ASTQuery(node).get_definition_name() or ""
            found[program] = Mutant(definition, before, after, line, name.removeprefix("core/"), code)
    return sorted(found.values(), key=lambda mutant: (mutant.line, mutant.operator, mutant.after))


def _is_representative(name: str) -> bool:
    source, _, target = name.removeprefix("core/ReplaceComparisonOperator_").partition("_")
    if name.startswith("core/ReplaceComparisonOperator_"):
        identities = {"Is", "IsNot"}  # instead of an order: False for most numbers; replaced by one: always the same
        return {source, target} == identities or not {source, target} & identities
    kind, _, pair = name.removeprefix("core/").partition("BinaryOperator_")
    source, _, target = pair.partition("_")
    return kind != "Replace" or REPLACEMENTS[source] == target


def _program(code: str) -> str:
    """The syntax tree, without what does not change the results (see the top); empty for code that does not compile."""
    try:
        return ast.dump(_Normalise().visit(ast.parse(code)))
    except SyntaxError:
        return ""


class _Normalise(ast.NodeTransformer):
    """Removes annotations, `frozen` and `strict`, and evaluates unary operators on numbers."""

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg in ("frozen", "strict") else self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.op, ast.Not) or not (
            isinstance(node.operand, ast.Constant) and type(node.operand.value) is int
        ):
            return node
        return ast.Constant(ast.literal_eval(node) if not isinstance(node.op, ast.Invert) else ~node.operand.value)


def _ignored_lines(source: str) -> set[int]:
    """Lines of raised errors, whose texts are not specified, of type aliases, and those marked `pragma: no mutate`."""
    ignored = {i for i, line in enumerate(source.splitlines(), 1) if "pragma: no mutate" in line}
    for node in ast.walk(ast.parse(source)):
        is_alias = isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and node.col_offset == 0
        if isinstance(node, ast.Raise) or is_alias:
            ignored |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return ignored


def _first_difference(source: str, code: str) -> tuple[str, str, int]:
    """The first changed line before and after, stripped, and its number."""
    old, new = source.splitlines(), code.splitlines()
    i = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    if len(old) == len(new):
        return old[i].strip(), new[i].strip(), i + 1
    decorator = next(j for j in range(i, len(old)) if old[j].strip())
    return old[decorator].strip(), "", decorator + 1
