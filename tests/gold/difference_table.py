"""Prints all differences: ``python tests/gold/difference_table.py DIRECTORY...``; see `exchange`.

Needs no package. Ends with status 1 unless every difference is within `TOLERANCE` and every control
is far outside.
"""

import json
import sys
from pathlib import Path

# Of logits up to 30. Measured are at most 4.1e-4, and 0.08 for the least of the controls.
TOLERANCE = 5e-4
CONTROL_MINIMUM = 1e-2
_CONTROL = "control"


def verdict(case: str, difference: float) -> tuple[bool, str]:
    """Whether a difference is as it should be, and that in words."""
    if case.startswith(_CONTROL):
        is_noticed = difference > CONTROL_MINIMUM
        return is_noticed, "differs, as it must" if is_noticed else "NOT NOTICED"
    # Not the other way round: NaN is no success.
    is_small = difference <= TOLERANCE
    return is_small, "ok" if is_small else "TOO LARGE"


def main(directories: list[Path]) -> int:
    num_wrong, largest = 0, 0.0
    for directory in directories:
        differences = json.loads((directory / "differences.json").read_text())
        direction = directory.name.replace("keras_hub", "keras-hub").replace("_", " ")
        for case, difference in sorted(differences.items()):
            is_right, words = verdict(case, difference)
            num_wrong += not is_right
            if not case.startswith(_CONTROL):
                largest = max(largest, difference)
            sys.stdout.write(f"{direction:20}  {case:24}  {difference:.1e}  {words}\n")
    sys.stdout.write(f"largest {largest:.1e}, allowed {TOLERANCE:.0e}, wrong {num_wrong}\n")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main([Path(argument) for argument in sys.argv[1:]]))
