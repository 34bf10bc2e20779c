"""One way down: jobs → pipelines → transforms → serving, and the thin reader stays thin."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("serving", "transforms", "pipelines", "jobs")
TRAINERS = ("keras", "tensorflow")
HEAVY = ("apache_beam", *TRAINERS)
EXTRAS = ("PIL", "ai_edge_litert", "google.cloud.storage", "google.auth", "boto3")
TRAINERS_ARE_KNOWN_TO = (("jobs", "backbones.py"), ("transforms", "engines.py"))


def modules(root: Path, room: str) -> list[Path]:
    return sorted((root / room).rglob("*.py"))


def forbidden(path: Path, room: str) -> tuple[str, ...]:
    """What the module at `path` may not import."""
    above = ROOMS[ROOMS.index(room) + 1 :]
    if room == "serving":
        return (*above, *HEAVY)
    return above if path.parts[-2:] in TRAINERS_ARE_KNOWN_TO else (*above, *TRAINERS)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Give line and full name of every import in a file, in functions and by name alone too."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from ((node.lineno, f"{'.' * level}{module or ''}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Name(id=called) | ast.Attribute(attr=called), args=[name, *_]):
                if called in ("__import__", "import_module"):
                    yield node.lineno, named(name)


def named(argument: ast.expr) -> str:
    """Read the beginning of a name that is computed."""
    match argument:
        case ast.Constant(value=str(name)) | ast.JoinedStr(values=[ast.Constant(value=str(name)), *_]):
            return name
    return ""


def begins(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def wrong_imports(root: Path) -> list[str]:
    """Name every import that goes upwards, is relative, or brings a package to a room that does without it."""
    return [
        f"{path.relative_to(root)}:{line} imports {name}"
        for room in ROOMS
        for path in modules(root, room)
        for line, name in imported(path)
        if name.startswith(".") or begins(name, forbidden(path, room))
    ]


def loaded(root: Path, *statements: str) -> set[str]:
    """Run statements in a fresh interpreter and return the names of the modules they brought.

    Some are there from the start: installed namespaces, such as `google.cloud`, are made by files of site-packages.
    """
    first, last = "import sys; before = {*sys.modules}", "print('\\n'.join(['loaded:', *({*sys.modules} - before)]))"
    code = "\n".join([first, *statements, last])
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=root
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.partition("loaded:\n")[2].split("\n"))


def loaded_by_room(root: Path, room: str) -> set[str]:
    names = [".".join(path.relative_to(root).with_suffix("").parts) for path in modules(root, room)]
    return loaded(root, *(f"import {name.removesuffix('.__init__')}" for name in names))


def among(names: set[str], prefixes: tuple[str, ...]) -> list[str]:
    return sorted(name for name in names if begins(name, prefixes))


def test_no_import_goes_upwards():
    assert all(len(modules(ROOT, room)) > 2 for room in ROOMS)
    assert wrong_imports(ROOT) == []


@pytest.mark.parametrize(
    ("room", "absent"),
    [
        ("serving", ("transforms", "pipelines", "jobs", *HEAVY)),
        ("transforms", ("pipelines", "jobs", *TRAINERS)),
        ("pipelines", ("jobs", *TRAINERS)),
        ("jobs", TRAINERS),
    ],
)
def test_importing_a_room_brings_nothing_from_above(room, absent):
    """Keras is imported by `jobs.backbones` when it exports, not before."""
    names = loaded_by_room(ROOT, room)
    assert {f"{room}.{path.stem}" for path in modules(ROOT, room) if path.stem != "__init__"} <= names
    assert among(names, absent) == []


@pytest.mark.parametrize("statement", ["import serving", "from serving import Index", "import serving.storage"])
def test_the_thin_reader_needs_no_extra(statement):
    names = loaded(ROOT, statement)
    assert among(names, ("serving",)) != []
    assert among(names, (*EXTRAS, *HEAVY, *ROOMS[1:])) == []


# --- These tests can fail -------------------------------------------------------------------------------------------


def plant(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text", "caught"),
    [
        ("serving/a.py", "import transforms.schema", "transforms.schema"),
        ("serving/a.py", "from pipelines import index", "pipelines.index"),
        ("serving/a.py", "from pipelines.index import run", "pipelines.index.run"),
        ("serving/a.py", "def late():\n    from jobs import embed", "jobs.embed"),
        ("serving/a.py", "try:\n    import apache_beam as beam\nexcept ImportError:\n    beam = None", "apache_beam"),
        ("serving/a.py", "if TYPE_CHECKING:\n    import keras", "keras"),
        ("serving/a.py", "from . import b", "..b"),
        ("serving/deep/a.py", "import os, jobs", "jobs"),
        ("transforms/a.py", "class A:\n    import pipelines.runner as runner", "pipelines.runner"),
        ("transforms/a.py", "from tensorflow import io", "tensorflow.io"),
        ("pipelines/a.py", "import importlib\nimportlib.import_module('jobs.embed')", "jobs.embed"),
        ("pipelines/a.py", "__import__(f'jobs.{verb}')", "jobs."),
        ("jobs/a.py", "import keras.applications", "keras.applications"),
    ],
)
def test_a_planted_import_is_caught(tmp_path, name, text, caught):
    (tmp_path / name).parent.mkdir(parents=True)
    plant(tmp_path, name, text)
    plant(tmp_path, "jobs/backbones.py", "def _keras():\n    import keras\n    return keras")
    [sentence] = wrong_imports(tmp_path)
    assert sentence.startswith(f"{name}:")
    assert sentence.endswith(f" imports {caught}")


def test_what_may_be_imported_is_not_caught(tmp_path):
    plant(tmp_path, "jobs/a.py", "import pipelines.embed, transforms, serving, apache_beam\nfrom jobs import options")
    plant(tmp_path, "transforms/a.py", "import apache_beam as beam\nfrom serving import jobs_done, storage")
    plant(tmp_path, "serving/a.py", "import kerasic, jobsite\nfrom serving.index import Index\nimport_module(name)")
    assert wrong_imports(tmp_path) == []


def test_a_planted_module_is_seen_at_run_time(tmp_path):
    plant(tmp_path, "serving/__init__.py", "")
    plant(tmp_path, "serving/planted.py", "from transforms.planted import NAME")
    plant(tmp_path, "transforms/planted.py", "NAME = 1")
    assert among(loaded_by_room(tmp_path, "serving"), ROOMS[1:]) == ["transforms", "transforms.planted"]
    assert among(loaded(tmp_path, "import serving"), ROOMS[1:]) == []
