"""A task and a reward for a random model: write the letter that is asked for, as often as you can.

Both are what ``plugins`` of a recipe may register: one function and one line each.
"""

import random

from qwenlong.rewards import Graded, register_reward
from qwenlong.stage_data import register_task
from qwenlong.types import Document, Sample


@register_reward("letter_share")
def letter_share(sample, text):
    """The share of characters that are the letter: dense, so that chance earns some."""
    return Graded(text.count(sample.answers[0]) / len(text), text[:40])


@register_task("letters")
def letters(count, seed, *, letters="ab", noise=(0, 40)):
    """``count`` questions over ``noise[0] .. noise[1]`` characters of text without meaning."""
    for index in range(count):
        rng = random.Random(f"{seed}/{index}")
        text = "".join(rng.choices("lorem ipsum ", k=rng.randint(*noise))) or "."
        yield Sample(
            id=f"letters-{noise[1]}-{index}",
            task="letters",
            question=f"Write the letter {letters[index % len(letters)]}.",
            instructions="Nothing else.",
            documents=[Document(id="noise", text=text)],
            answers=[letters[index % len(letters)]],
            answer_type="text",
            reward="letter_share",
        )
