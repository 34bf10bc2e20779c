"""Options of a job: declared once as a frozen dataclass, from which its command line is built."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from serving.errors import UsageError

T = TypeVar("T")


def option(help: str, default: Any = dataclasses.MISSING, *, metavar: str | None = None, choices: Any = None) -> Any:
    """Declare one option; without a default it is required. `choices` may be a function giving them."""
    metadata = {"help": help, "metavar": metavar, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def positional(help: str, metavar: str) -> Any:
    """Declare an argument without a flag."""
    return dataclasses.field(metadata={"help": help, "metavar": metavar, "positional": True})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def parse(kind: type[T], argv: Sequence[str], verb: str, about: str, beam: bool = False) -> tuple[T, list[str]]:
    """Parse `argv` into `kind`; with `beam`, flags that are not the job's own are returned for Beam."""
    footer = "Flags that are not listed here go to Beam, such as --runner=FlinkRunner." if beam else None
    parser = _Parser(
        prog=f"lookalike {verb}",
        description=about,
        epilog=footer,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser, kind)
    found, rest = parser.parse_known_args(list(argv))
    known = [name for name in parser._option_string_actions if name.startswith("--")]
    if beam:
        from pipelines.runner import refuse_unknown

        refuse_unknown(rest, known)
    elif rest:
        close = difflib.get_close_matches(rest[0].partition("=")[0], known, 1)
        parser.error(f"{rest[0]} is not an option" + (f"; did you mean {close[0]}?" if close else ""))
    return kind(**vars(found)), rest


def _add_options(parser: argparse.ArgumentParser, kind: Any) -> None:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        settings = _argument(hints[field.name], field)
        if field.metadata.get("positional"):
            parser.add_argument(field.name, **settings)
            continue
        required = field.default is dataclasses.MISSING
        default = None if required else field.default
        flag = f"-{field.name}" if len(field.name) == 1 else f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, required=required, default=default, **settings)


def _argument(hint: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    text: str = field.metadata["help"]
    if hint is bool:
        return {"action": "store_true", "help": text}
    choices = field.metadata.get("choices")
    settings: dict[str, Any] = {
        "choices": choices() if callable(choices) else choices,
        "metavar": field.metadata.get("metavar"),
    }
    if get_origin(hint) is tuple:
        settings |= {"nargs": "+", "type": get_args(hint)[0], "action": _AsTuple}
    else:
        inner = [arg for arg in get_args(hint) if arg is not type(None)]
        settings["type"] = inner[0] if inner else hint
    shown = field.default
    if shown is not dataclasses.MISSING and shown not in (None, "", ()):
        text += f" (default: {shown})"
    return {**settings, "help": text.replace("%", "%%")}


class _AsTuple(argparse.Action):
    """Collect several values, also from several mentions of the flag."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _flag: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest) or ()
        setattr(namespace, self.dest, (*(before if before != self.default else ()), *values))
