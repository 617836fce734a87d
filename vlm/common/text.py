"""How things are written in messages, tables and pages."""


def shorten(text: str, longest: int) -> str:
    """At most `longest` characters, cut in the middle, because long names often differ at their end."""
    return text if len(text) <= longest else f"{text[: longest * 2 // 3 - 1]}…{text[len(text) - longest // 3 :]}"


def dtype_name(dtype: object) -> str:
    """The name of a `torch.dtype` as users type it after --dtype, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
