"""``python -m curvopt.doctor PATH``: examine a saved run.

PATH is a PEFT adapter folder (a trainer's checkpoint folder is one), or a torch file that holds an optimizer's
state_dict or the tensors of an adapter. Exit code: 0 healthy, 1 something needs attention, 2 PATH cannot be examined.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from curvopt.analysis import inspect_saved


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report of a saved run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m curvopt.doctor", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("path", metavar="CHECKPOINT_OR_ADAPTER_DIR")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    args = parser.parse_args(argv)
    try:
        found = inspect_saved(args.path)
    except (ValueError, OSError) as error:
        print(f"curvopt.doctor: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)
    return 0 if found.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
