"""`lookalike VERB …`, the same as `python -m jobs.VERB …`."""

import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from serving.errors import LookalikeError, MissingExtra

VERBS = {
    "embed": "images in folders or buckets become embeddings in a store",
    "index": "a store becomes a published index: train, encode, merge, measure, publish",
    "train": "train a quantizer on a store, and nothing else",
    "merge": "encode and merge a store with a trained quantizer into a version",
    "search": "find the nearest indexed images of some pictures",
    "verify": "check again everything that an index or a store says of itself",
    "demo": "embed, index and search a collection drawn on the spot, or a folder of yours",
}

_EXTRAS = {"search": "images", "verify": "images"}
"""What a verb needs beyond the bare install, where it is not `pipeline`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"lookalike: {verb} is not a verb; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        code: int = _load(verb).main(rest)
    except LookalikeError as error:
        print(f"lookalike {verb}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\nlookalike {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return code


def _load(verb: str) -> Any:
    try:
        return importlib.import_module(f"jobs.{verb}")
    except (ModuleNotFoundError, MissingExtra) as error:
        raise MissingExtra("it", _EXTRAS.get(verb, "pipeline")) from error


def _overview() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    head = "usage: lookalike VERB [options]\n\nReverse image search built in batch."
    return f"{head}\n\n{verbs}\n\nlookalike VERB --help tells more."


if __name__ == "__main__":
    sys.exit(main())
