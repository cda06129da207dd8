"""Values of settings as text: in --model-set, and in TOML files."""

from contextlib import suppress

LITERALS = {"true": True, "false": False, "none": None}


def parse_value(text: str) -> bool | int | float | str | None:
    """Parse true, false, none or a number; any other text is returned unchanged."""
    if text.lower() in LITERALS:
        return LITERALS[text.lower()]
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def to_toml(value: bool | int | float | str) -> str:
    """A value in a TOML file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)
