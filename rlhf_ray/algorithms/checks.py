"""The check of a number that a loss or a controller is built with."""


def require(holds: bool, name: str, got: object, wanted: str) -> None:
    """Nothing; raises ValueError naming the argument where `holds` is false."""
    if not holds:
        raise ValueError(f"{name}: got {got!r}, wanted {wanted}")
