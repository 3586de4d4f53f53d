"""Selections of topics by name and by pattern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

# Up to this many patterns are tried one by one.
FEW_PATTERNS = 4
# Patterns are indexed by up to this many bytes at one end or by fewer in the middle.
MAX_END_BYTES, MAX_MIDDLE_BYTES = 32, 4
# Failed jobs are moved to the topic with this suffix.
FAILED_SUFFIX = b"/failed"
# The memory that a name takes, in addition to its bytes, while a client waits for it.
NAME_OVERHEAD_BYTES = 500
SHORT_NAMES, SHORT_BYTES = 8, 1024

_START, _END, _ANYWHERE = range(3)


class Pattern:
    """A name that contains `*`. Each `*` matches any characters, including none."""

    __slots__ = ("_least", "_middle", "_prefix", "_suffix", "anchor", "text")

    def __init__(self, text: bytes) -> None:
        self.text = text
        self._prefix, *middle, self._suffix = text.split(b"*")
        self._middle = tuple(filter(None, middle))
        self._least = len(text) - text.count(b"*")
        self.anchor = self._find_anchor()
        """An offset and the bytes that each matching name has there."""

    def _find_anchor(self) -> tuple[int, bytes]:
        if not (self._prefix or self._suffix) and self._middle:
            return _ANYWHERE, max(self._middle, key=len)[:MAX_MIDDLE_BYTES]
        if len(self._prefix) >= len(self._suffix):
            return _START, self._prefix[:MAX_END_BYTES]
        return _END, self._suffix[-MAX_END_BYTES:]

    def matches(self, name: bytes) -> bool:
        """Return whether a name matches, in time linear in its length.

        Regular expressions may take exponential time. Here, it is enough to try the leftmost place of each part,
        because that leaves the most room for the next one.
        """
        if len(name) < self._least or not (name.startswith(self._prefix) and name.endswith(self._suffix)):
            return False
        at, end = len(self._prefix), len(name) - len(self._suffix)
        for part in self._middle:
            at = name.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True


class PatternIndex:
    """Finds the patterns that a name may match without trying all of them."""

    def __init__(self, patterns: Iterable[Pattern] = ()) -> None:
        # By the offsets and lengths of their anchors; then by the anchors themselves.
        self._tables: dict[tuple[int, int], dict[bytes, list[Pattern]]] = {}
        for pattern in patterns:
            self.add(pattern)

    def add(self, pattern: Pattern) -> None:
        place, anchor = pattern.anchor
        self._tables.setdefault((place, len(anchor)), {}).setdefault(anchor, []).append(pattern)

    def candidates(self, name: bytes) -> Iterator[Pattern]:
        """Iterate over the patterns that the name may match."""
        for (place, length), table in list(self._tables.items()):
            if length > len(name):
                continue
            if place == _ANYWHERE:
                anchors = {name[at : at + length] for at in range(len(name) - length + 1)}
            else:
                anchors = {name[:length] if place == _START else name[len(name) - length :]}
            for anchor in anchors:
                yield from tuple(table.get(anchor, ()))


class Selection:
    """The topics with one of these names or a name that matches one of these patterns."""

    __slots__ = ("__weakref__", "_index", "is_short", "names", "patterns")

    def __init__(self, words: Iterable[bytes]) -> None:
        """Words with `*` are patterns."""
        unique = set(words)
        self.patterns = tuple(Pattern(word) for word in sorted(unique) if b"*" in word)
        self.names = frozenset(word for word in unique if b"*" not in word)
        self.is_short = len(unique) <= SHORT_NAMES and sum(map(len, unique)) <= SHORT_BYTES
        """Whether the selection is small enough to keep as a connection's last selection."""
        self._index = PatternIndex(self.patterns) if len(self.patterns) > FEW_PATTERNS else None

    @property
    def words(self) -> list[bytes]:
        """All names and patterns."""
        return [*(pattern.text for pattern in self.patterns), *self.names]

    @property
    def size(self) -> int:
        """The approximate memory that the selection takes while a client waits for its topics."""
        words = self.words
        return sum(map(len, words)) + NAME_OVERHEAD_BYTES * len(words)

    @property
    def about(self) -> bytes:
        """All names and patterns, as text."""
        return b", ".join(sorted(self.words))

    def matches(self, name: bytes) -> bool:
        if name in self.names:
            return True
        for pattern in self.patterns if self._index is None else self._index.candidates(name):
            if pattern.matches(name):
                return True
        return False


class JobSelection(Selection):
    """The topics from which a group takes jobs: one, or those that match a pattern.

    A pattern does not match topics of failed jobs, unless it ends like them. Otherwise, jobs of the group that have
    failed would come back as new ones.
    """

    __slots__ = ("_has_failed",)

    def __init__(self, key: bytes) -> None:
        super().__init__([key])
        self._has_failed = not self.patterns or key.endswith(FAILED_SUFFIX)

    def matches(self, name: bytes) -> bool:
        return super().matches(name) and (self._has_failed or not name.endswith(FAILED_SUFFIX))
