"""Jinja templates with the extensions and the restrictions of transformers' chat templates."""

import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fira.errors import UserError
from fira.files import one_line


class JinjaTemplate:
    """A compiled template. Raises UserError if it is invalid.

    generation: texts that enclose the blocks `{% generation %}` of the rendered text, which the assistant generates.
    """

    def __init__(self, source: str, generation: tuple[str, str]) -> None:
        try:
            self._template = _environment(generation).from_string(source)
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template is invalid in line {error.lineno} ({one_line(error)})") from None
        except RecursionError:
            raise UserError("the chat template is nested too deeply; correct it") from None

    def render(self, variables: Mapping[str, Any], where: str) -> str:
        """Return the rendered text. Raises UserError, which begins with `where`, if the template fails."""
        try:
            return self._template.render(variables)
        except TemplateError as error:
            reason = f"the chat template cannot format the messages ({one_line(error)})"
            raise UserError(f"{where}: {reason}; correct one of them") from None
        except Exception as error:  # code in a template can raise any exception
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{where}: the chat template fails ({reason}); correct it") from None


class _Generation(Extension):
    """The block `{% generation %}`."""

    tags = {"generation"}  # noqa: RUF012 (a set in the base class)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

    def _enclosed(self, caller: Macro) -> str:
        begin, end = self.environment.generation  # type: ignore[attr-defined]
        return f"{begin}{caller()}{end}"


class _Unknown(Undefined):
    """A variable that does not exist. A template can compare or test it, but not print it."""

    def __str__(self) -> str:
        return str(self._fail_with_undefined_error())


def _environment(generation: tuple[str, str]) -> ImmutableSandboxedEnvironment:
    """Return the environment of transformers, without `strftime_now`: training data do not depend on the date."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **settings: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=_Unknown, extensions=[_Generation, loopcontrols]
    )
    environment.extend(generation=generation)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment
