"""Settings of weight-only quantisation. The matrices are in `quantized_matrix`.

This module does not import torch, so that flags can be parsed without it.
"""

from dataclasses import dataclass

from fira.errors import UserError

FORMS = ("int8", "int4", "int8+head", "int4+head")


@dataclass(frozen=True)
class Quantization:
    """bits: 8 or 4, of the matrices of all blocks but the router. head: quantise the head as well, always in 8 bits."""

    bits: int
    head: bool = False

    @classmethod
    def parse(cls, text: str) -> "Quantization":
        """Parse one of FORMS. Raises UserError for any other text."""
        if text not in FORMS:
            raise UserError(f"no quantisation {text!r}; give one of {', '.join(FORMS)}")
        form, _, head = text.partition("+")
        return cls(int(form.removeprefix("int")), bool(head))

    def __str__(self) -> str:
        return f"int{self.bits}{'+head' if self.head else ''}"
