"""What contradicts the protocol though each row can be read: what a pair file says twice, and test
pairs that were trained on."""

import os
from functools import cache

from data import Item, Key, Pair, Pairs

real_path = cache(os.path.realpath)  # a file system far away is asked once


def spelt_once(item: Item) -> list[Key]:
    """The (video, prompt) keys of an item, however they are spelt: links are followed, white space
    counts once."""
    return [(real_path(video), " ".join(prompt.split())) for video, prompt in item.videos()]


def findings(pairs: Pairs, train: Pairs | None = None) -> list[str]:
    """A line each, where there are any: the pairs that stand with more than one label, those that
    stand there more than once, and of test pairs those that a model was trained on."""
    rows: dict[frozenset[Key], list[str]] = {}  # by what a pair is about
    labels: dict[frozenset[Key], set] = {}
    for pair in pairs:
        if isinstance(pair, Pair):
            keys = spelt_once(pair)
            better = {1: keys[0], -1: keys[1], 0: None}[pair.human]
            rows.setdefault(frozenset(keys), []).append(str(pair.row))
            labels.setdefault(frozenset(keys), set()).add(better)
    found = {
        "have more than one label": [about for about in rows if len(labels[about]) > 1],
        "stand there more than once": [about for about in rows if len(rows[about]) > 1 == len(labels[about])],
    }
    if train:
        trained = {frozenset(spelt_once(item)) for item in train}
        keys = frozenset().union(*trained)
        found[f"are training pairs too, of {train.path}"] = [about for about in rows if about in trained]
        found[f"share a video and its prompt with training pairs of {train.path}"] = [
            about for about in rows if about & keys and about not in trained]
    lines = []
    for what, abouts in found.items():
        named = [" and ".join(rows[about]) for about in abouts[:5]]
        more = ", …" if len(abouts) > 5 else ""
        if abouts:
            lines.append(f"{pairs.path}: {len(abouts)} pairs {what}: row {', '.join(named)}{more}")
    return lines
