"""Spoken language models that speak without end in constant memory."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`speechssm.load` and `speechssm.export`, imported when first asked for: they need torch."""
    if name in ("load", "export"):
        from speechssm import loading

        return getattr(loading, name)
    raise AttributeError(f"module 'speechssm' has no attribute {name!r}")
