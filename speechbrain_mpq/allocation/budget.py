"""What a budget says: bits on average, or bytes."""

import re

UNITS = {
    "bit": None,
    "bits": None,
    "b": 1,
    "byte": 1,
    "bytes": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


MOST_BITS = 32  # above it a bare number means bytes


def parse_budget(budget):
    """Arguments of `allocate_bits` for a budget."""
    unit = ""
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", budget)
        if not found or found[2] and found[2].lower() not in UNITS:
            raise ValueError(_message(budget))
        budget, unit = float(found[1]), found[2].lower()
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise ValueError(_message(budget))
    if not 0 < budget < float("inf"):
        raise ValueError(_message(budget))
    if unit and UNITS[unit]:
        return {"budget_bytes": int(budget * UNITS[unit])}
    if budget > MOST_BITS and not unit:
        return {"budget_bytes": int(budget)}
    whole = int(budget) if budget == int(budget) else budget
    return {"average_bits": whole}


def _message(budget):
    """How a budget is to be written."""
    return (
        f"budget {budget!r} is not understood: give bits on average such as 4 "
        'or "2.5 bit", or bytes such as 350000 or "350 KiB"'
    )
