"""How much of a published data set is there, beside what its authors say."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

NUM_NAMED = 3


@dataclass(frozen=True)
class Count:
    """A number that a data set is known by.

    Args:
        what: is counted.
        found: here.
        expected: by its authors.
        source: where they say so.
        remark: names of what is missing, or why a difference need not matter.
    """

    what: str
    found: int
    expected: int
    source: str
    remark: str = ""

    @property
    def complete(self) -> bool:
        """Whether all is there, and nothing else."""
        return self.found == self.expected

    def __str__(self) -> str:
        mark = "ok" if self.complete else "DIFFERS"
        remark = f": {self.remark}" if self.remark and not self.complete else ""
        return f"{self.what}: {self.found:,} of {self.expected:,} ({self.source}) {mark}{remark}"


def named(names: Iterable[str]) -> str:
    """The first of some names, and how many more there are."""
    listed = list(names)
    more = f", and {len(listed) - NUM_NAMED:,} more" if len(listed) > NUM_NAMED else ""
    return ", ".join(listed[:NUM_NAMED]) + more


def refuse_left_out(left_out: Mapping[str, str]) -> None:
    """Refuses paths that weren't taken for videos of the set; ValueError, which names them and why."""
    if left_out:
        names = named(f"{path}: {reason}" for path, reason in left_out.items())
        raise ValueError(f"{len(left_out):,} left out ({names}). Move them away, or use dataset.strict=false")


def refuse_twice(names: Sequence[str], root: str) -> None:
    """Refuses a folder in which the same video lies twice, as a file and as a folder of frames, say.

    Raises ValueError, which names the two.
    """
    seen: dict[str, str] = {}
    for name in names:
        stem = PurePosixPath(name).stem
        other = seen.setdefault(stem.casefold(), name)
        if other != name:
            raise ValueError(
                f"{root} holds {stem} twice, as {other} and as {name}: each video would count double. "
                "Point dataset.root to the folder of one of them"
            )
