"""The images that a table of several labels names, as a place of images."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipeline.data.archive import MORE_THAN_ONCE
from pipeline.data.label_table import (
    LabelTable,
    files_in,
    images_in_no_table,
    match_files,
    read_label_table,
)
from pipeline.data.source import FileSource, Group, ImageIssue, Listing, Member, Stream


@dataclass(frozen=True)
class LabelTableSource:
    """The images that the table `root` names, from the place `images`; see `read_label_table`.

    Attributes:
        classes: those that there may be, in the order of the network's outputs; None for the table's own.
        split: whose rows are taken, as `name_of_split` takes it, where the table says of each which it is for; None: all.
        beside, aside: as of `TableSource`.
    """

    root: str
    images: FileSource
    classes: tuple[str, ...] | None = None
    split: str | None = None
    beside: str | None = None
    aside: str | None = None

    @classmethod
    def at(cls, root: str) -> FileSource | None:
        return None  # a table does not show by itself how many labels an image has

    @cached_property
    def table(self) -> LabelTable:
        """What the table says.

        Raises:
            UserError: see `read_label_table`.
        """
        return read_label_table(Path(self.root), self.classes, self.split)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """The row of each image, by its name.

        Raises:
            UserError: see `match_files`; an image of training is of another split too.
        """
        names = match_files(Path(self.root), self.table.files, self._members, self.images.root, self.table.lines)
        return {names[row]: row for row in sorted(range(len(names)), key=names.__getitem__)}

    def groups(self) -> tuple[list[Group], list[ImageIssue]]:
        return [self.flat()], []

    def flat(self) -> Group:
        # Both splits of a table have one cache file.
        return Group("", self._list, key=self.split or "" if self.table.elsewhere else "")

    def open(self, name: str, offset: int, length: int) -> Stream:
        return self.images.open(name, offset, length)

    def location(self, name: str) -> str:
        return self.images.location(name)

    @cached_property
    def _listing(self) -> Listing:
        return self.images.flat().list()

    @cached_property
    def _members(self) -> dict[str, Member]:
        return {member.name: member for member in self._listing.members}

    def _list(self) -> Listing:
        named, members = self.row_of, self._members
        issues = [issue for issue in self._listing.issues if issue.stops or issue.fault == MORE_THAN_ONCE]
        issues += images_in_no_table(
            self.root, self.beside, self.aside, self.split, self.images, members, named, self.table.elsewhere, files_in
        )
        return Listing(tuple(members[name] for name in named), tuple(issues))
