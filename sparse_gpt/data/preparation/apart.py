"""Files to hold out and files to train on: each on one side."""

from collections.abc import Sequence
from dataclasses import replace

from sparse_gpt.data.corpus.slices import Cut
from sparse_gpt.data.corpus.sources import SourceFile
from sparse_gpt.data.preparation.appending import identity
from sparse_gpt.data.shards.manifest import Manifest
from sparse_gpt.errors import DataError

_HELD_OUT = {"split": "held_out"}  # in a source's row of the manifest


def files_apart(train: list[SourceFile], held_out: list[SourceFile]) -> list[SourceFile]:
    """All of them, those to hold out marked. Raises DataError if a file is in both."""
    known = {file.path.resolve() for file in train}
    for file in held_out:
        if file.path.resolve() in known:
            raise DataError(
                f"{file.path}: is to be held out, and among the sources too; name it in one of them"
            )
    return [*train, *(replace(file, held_out=True) for file in held_out)]


def sides_apart(cuts: Sequence[Cut], old: Manifest | None) -> list[Cut]:
    """The cuts, rows of files to hold out saying so. Raises DataError if the same content is also
    trained on: a copy of a file, or one that is in the old corpus."""
    made = [
        Cut(cut.slices, cut.row | _HELD_OUT) if cut.slices and cut.slices[0].file.held_out else cut
        for cut in cuts
    ]
    sides: dict[str, dict[str, str]] = {}  # by content: a file's name by side
    for row in [*(old.sources if old else []), *(cut.row for cut in made)]:
        names = sides.setdefault(identity(row), {})
        names.setdefault(row.get("split", "train"), row["name"])
        if len(names) > 1:
            raise DataError(
                f"{names['held_out']}: is to be held out, but its content is also that of "
                f"{names['train']}, which is trained on; leave one of them out"
            )
    return made
