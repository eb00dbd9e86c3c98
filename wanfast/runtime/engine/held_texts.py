"""Holds text embeddings in host memory: only those of the next videos, because a list may have thousands of texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import chain

from torch import Tensor

from wanfast.runtime.engine.prompt_embeds import Encoded

MOST = 32  # embeddings that are held, 8 MB each at most; the store may have the others


class HeldTexts:
    """Holds up to MOST text embeddings: those that the next clips need, and the last used ones if there is room.

    The method `expect` gets the list of clips. The next clips are the clips of this list that are not made yet. An
    embedding that is not stored on disk is held until no next clip needs it, even if more than MOST embeddings
    are then held.
    """

    def __init__(self, load: Callable[[list[str], int], Encoded]) -> None:
        """`load(texts, most)` makes embeddings; it returns those of the first `most` texts, and all unstored ones."""
        self._load = load
        self._held: dict[str, Tensor] = {}  # the last used come last
        self._unstored: set[str] = set()
        self._not_finite: set[str] = set()  # texts of the list, which only their own clips encode again
        self._clips: list[tuple[str, ...]] = []  # the texts of each clip of the list that is not made yet, in order

    def __len__(self) -> int:
        return len(self._held)

    def expect(self, clips: Iterable[tuple[str, ...]]) -> set[str]:
        """Makes the embeddings of all texts of a list of clips, and returns the texts whose embeddings are not finite.

        `clips` holds the texts of each clip, in the order in which the clips will be made. The clips of an earlier call
        are forgotten.
        """
        self._clips, self._not_finite = list(clips), set()
        ahead = list(dict.fromkeys(chain(*self._clips)))
        self._hold(ahead, [text for text in ahead if text not in self._held])
        return self._not_finite

    def use(self, texts: tuple[str, ...]) -> dict[str, Tensor]:
        """Returns {text: embedding [n, text_dim]} for the texts of the clip that is made next.

        Texts whose embeddings are not finite are left out. After this call, the clip counts as made, and so do all
        clips before it in the list that `expect` got. If an embedding of `texts` is not held, this method
        loads it. The method then also loads embeddings for the following clips, until MOST embeddings are held.
        """
        with suppress(ValueError):  # a clip of another list
            del self._clips[: self._clips.index(texts) + 1]
        ahead = list(dict.fromkeys(chain(texts, *self._clips)))
        unwanted = self._held.keys() | self._not_finite.difference(texts)
        is_held = self._held.keys() >= {*texts}
        self._hold(ahead, [] if is_held else [text for text in ahead[:MOST] if text not in unwanted])
        used = {text: self._held.pop(text) for text in dict.fromkeys(texts) if text in self._held}
        self._held |= used
        return used

    def clear(self) -> None:
        """Frees all embeddings, and forgets the list of clips."""
        self._held, self._clips, self._unstored, self._not_finite = {}, [], set(), set()

    def _hold(self, ahead: list[str], new: list[str]) -> None:
        """Drops what leaves no room for the `new` texts, and loads these; `ahead`: all texts in the order of need."""
        window = set(ahead[:MOST])
        most = sum(text in window for text in new)
        needed = window | self._unstored.intersection(ahead)
        spare = [text for text in self._held if text not in needed]
        for text in spare[: max(0, len(self._held) + most - MOST)]:
            del self._held[text]
        self._unstored &= self._held.keys()
        if new:
            found = self._load(new, most)
            self._held |= found.embeds
            self._unstored |= found.unstored
            self._not_finite.update(found.not_finite)
