"""Files that stay, and files that go."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from serving import storage
from serving.storage import Entry


@dataclass(frozen=True, slots=True)
class Pile:
    """Files that stay or go together, and why they stay."""

    kind: str
    name: str
    files: tuple[Entry, ...]
    why: str = ""

    @property
    def size(self) -> int:
        """Return how many bytes they are."""
        return sum(file.size for file in self.files)


@dataclass(slots=True)
class Sorted:
    """What goes, in this order, what stays, and what had to be left, each in a sentence."""

    is_old: Callable[[Entry], bool]
    """Tells a file that no job at work can have written."""
    young: str
    """How the others are called."""
    removed: list[Pile] = field(default_factory=list)
    kept: list[Pile] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def are_old(self, files: Iterable[Entry]) -> bool:
        """Tell files that no job at work can have written."""
        return all(map(self.is_old, files))

    def keep(self, kind: str, name: str, files: Iterable[Entry], why: str) -> None:
        """Keep files, but not what killed writers left among them."""
        whole, cut_short = split(files, lambda file: not (storage.is_temporary(file.uri) and self.is_old(file)))
        self._add(self.kept, Pile(kind, name, tuple(whole), why))
        self.remove("temporary file", "", cut_short)

    def remove(self, kind: str, name: str, files: Iterable[Entry]) -> None:
        """Let files go."""
        self._add(self.removed, Pile(kind, name, tuple(files)))

    def sort(self, kind: str, name: str, files: Sequence[Entry], why: str) -> bool:
        """Keep files if there is a reason, or if they are young; else let them go. Tell whether they stay."""
        why = why or ("" if self.are_old(files) else self.young)
        if why:
            self.keep(kind, name, files, why)
        else:
            self.remove(kind, name, files)
        return bool(why)

    @staticmethod
    def _add(piles: list[Pile], pile: Pile) -> None:
        if pile.files:
            piles.append(pile)


def split(files: Iterable[Entry], stays: Callable[[Entry], bool]) -> tuple[list[Entry], list[Entry]]:
    """Part files in those for which `stays` is true, and the others."""
    sides: tuple[list[Entry], list[Entry]] = [], []
    for file in files:
        sides[not stays(file)].append(file)
    return sides
