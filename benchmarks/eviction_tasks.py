"""Make retrieval prompts: a pass key or a sentence hidden in a long text, and the text itself.

The words and the grammar are the project's own. The repeated filler and the wording of the pass key are the
usual ones of the task. `examples/train_passkey_model.py` trains on the same kinds of text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from tasks import Encode, passkey_cells, split

from kvexport.errors import UsageError

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
SENTENCE = "\nThe best thing to do in {place}: {what}.\n"
ASKED = "\nWhat is the best thing to do in {place}? The best thing to do in {place}:"

# fmt: off
PLACES = (
    "Aldo", "Bern", "Cairo", "Delft", "Essen", "Faro", "Ghent", "Hull", "Izmir", "Jena", "Kyoto", "Lima",
    "Malmo", "Nice", "Oslo", "Porto", "Quito", "Riga", "Seoul", "Turin", "Ulm", "Vigo", "Wells", "York",
)
VERBS = (
    "paint", "carry", "build", "watch", "follow", "count", "borrow", "repair", "draw", "open", "visit",
    "clean", "move", "weigh", "fill", "keep", "bring", "hide", "sell", "turn",
)
KINDS = (
    "red", "small", "old", "heavy", "quiet", "round", "wooden", "bright", "empty", "narrow", "broken", "warm",
    "yellow", "strange", "soft", "early", "silver", "plain",
)
THINGS = (
    "boat", "lamp", "bridge", "garden", "horse", "window", "letter", "kettle", "tower", "basket", "clock",
    "river", "stone", "ladder", "market", "coat", "drum", "harbour", "mill", "piano", "cart", "candle",
    "field", "mirror",
)
DOING = (
    "painting", "carrying", "building", "watching", "following", "counting", "borrowing", "repairing",
    "drawing", "opening", "visiting", "cleaning", "moving", "weighing", "filling", "keeping", "bringing",
    "hiding", "selling", "turning",
)
HOW = ("daily", "twice", "slowly", "together", "alone", "quickly", "often", "quietly")
COUNTS = ("two", "six", "ten", "twenty", "forty", "fifty", "ninety", "many")
WHERE = (
    "at noon", "by the river", "in the rain", "before dawn", "under the bridge", "near the mill",
    "after lunch", "on the hill",
)
# fmt: on
TASKS = {
    "passkey": "a pass key of five digits in the repeated filler",
    "passkey-varied": "a pass key of five digits in varied sentences",
    "needle": "a sentence about a place in varied sentences, some about that place too",
}


@dataclass(frozen=True)
class Prompts:
    """Prompts of one length, each with the token ids of its answer, and where in the text the answer is (0:
    first, 1: last)."""

    task: str
    length: int
    prompts: Sequence[tuple[list[int], list[int]]]
    depths: Sequence[float]


def varied(chance: random.Random) -> str:
    """A sentence with a space after it."""
    kind, other, thing, second = (
        chance.choice(KINDS),
        chance.choice(KINDS),
        chance.choice(THINGS),
        chance.choice(THINGS),
    )
    forms = (
        lambda: f"The {kind} {thing} is near the {other} {second}. ",
        lambda: (
            f"In {chance.choice(PLACES)} they {chance.choice(VERBS)} the {thing} {chance.choice(WHERE)}. "
        ),
        lambda: f"We {chance.choice(VERBS)} a {kind} {thing} and {chance.choice(VERBS)} the {second}. ",
        lambda: f"There are {chance.choice(COUNTS)} {kind} things in {chance.choice(PLACES)}. ",
        lambda: f"Is the {thing} {kind}? No, the {second} is {other}. ",
    )
    return chance.choice(forms)()


def haystack(kind: str, characters: int, seed: int) -> str:
    """Text to hide things in, "repeated" or "varied", at least so long."""
    if kind == "repeated":
        return REPEATED * (characters // len(REPEATED) + 1)
    chance, parts, length = random.Random(seed), [], 0
    while length < characters:
        parts.append(varied(chance))
        length += len(parts[-1])
    return "".join(parts)


def best_thing(chance: random.Random) -> tuple[str, str]:
    """A place, and what to do there, in words that the text around it does not have."""
    return chance.choice(PLACES), f"{chance.choice(DOING)} {chance.choice(THINGS)}s {chance.choice(HOW)}"


def hide(hay: Sequence[int], needles: Sequence[tuple[float, Sequence[int]]]) -> list[int]:
    """Token ids with each needle at its depth (0..1) in them, whatever sentence that cuts."""
    found: list[int] = []
    at = 0
    for depth, needle in sorted(needles, key=lambda each: each[0]):
        cut = round(depth * len(hay))
        found += [*hay[at:cut], *needle]
        at = cut
    return [*found, *hay[at:]]


def prompts_of(
    encode: Encode,
    task: str,
    length: int,
    depths: Sequence[float],
    trials: int,
    seed: int = 0,
    start: Sequence[int] = (),
) -> Prompts:
    """Prompts of `length` tokens, answer included: so many trials at each depth.

    Raises:
        UsageError: the length leaves no room for what must be in it.
    """
    kind = "repeated" if task == "passkey" else "varied"
    hay = haystack(kind, 40 * length + 4000, seed)
    if task != "needle":
        cells = passkey_cells(encode, hay, [length], depths, trials, seed=seed, start=start)
        return Prompts(
            task,
            length,
            [each for cell in cells for each in cell.prompts],
            [d for d in depths for _ in range(trials)],
        )
    chance, ids, found = random.Random(seed), encode(hay), []
    for depth in depths:
        for _ in range(trials):
            place, what = best_thing(chance)
            asked, answer = split(encode, ASKED.format(place=place), f" {what}")
            needle = encode(SENTENCE.format(place=place, what=what))
            room = length - len(start) - len(asked) - len(answer) - len(needle)
            if not 0 <= room <= len(ids):
                raise UsageError(
                    "a needle's prompt cannot be made this long",
                    got=f"{length} tokens",
                    expected=f"{length - room} or more",
                )
            at = chance.randrange(len(ids) - room + 1)
            found.append(([*start, *hide(ids[at : at + room], [(depth, needle)]), *asked], answer))
    return Prompts(task, length, found, [d for d in depths for _ in range(trials)])
