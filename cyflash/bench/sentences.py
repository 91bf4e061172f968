"""English sentences of many lengths, always the same: what a model of text is measured on."""
import numpy as np

WHO = (
    "the baker", "my younger sister", "an old lighthouse keeper", "the committee", "nobody in the village", "a red fox",
    "the night train", "our new neighbour", "the physics teacher", "a tired nurse", "the mayor", "every second student",
    "the painter's daughter", "a quiet accountant", "the orchestra", "one of the engineers",
)  # fmt: skip
DOES = (
    "forgot", "repaired", "was looking for", "sold", "wrote a long letter about", "could not explain", "painted",
    "had never seen", "argued about", "measured", "gave away", "dreamt of", "carried", "kept asking for", "invented",
    "laughed at",
)  # fmt: skip
WHAT = (
    "the broken clock", "a loaf of rye bread", "the results of the election", "three wooden chairs",
    "a map of the stars", "the price of copper", "the last bus to the coast", "an unfinished symphony",
    "the smell of rain", "a proof by induction", "the keys to the cellar", "two tickets for the opera",
    "the history of salt", "a small blue bicycle", "the winter harvest", "an umbrella without a handle",
)  # fmt: skip
WHERE = (
    "in the harbour", "behind the old station", "during the meeting", "on the way to school", "at three in the morning",
    "before the storm reached the valley", "without telling anyone", "in a language that few people still speak",
    "while the soup was getting cold on the stove", "for the second time that year",
)  # fmt: skip
WHY = (
    "because the bridge was closed", "although it was against the rules",
    "since there was no other way to pay the rent", "so that the children could sleep",
    "as if nothing had happened since the spring",
    "which surprised even those who had known about it for years, and made the newspapers write of little else",
)  # fmt: skip


def sentences(n):
    """n different sentences, of 5 to 50 words or so."""
    rng, made = np.random.default_rng(0), {}
    while len(made) < n:
        parts = [str(rng.choice(WHO)), str(rng.choice(DOES)), str(rng.choice(WHAT))]
        for more, chance in ((WHERE, 0.7), (WHY, 0.5)):
            if rng.random() < chance:
                parts.append(str(rng.choice(more)))
        if rng.random() < 0.3:
            parts += ["and then", str(rng.choice(WHO)), str(rng.choice(DOES)), str(rng.choice(WHAT))]
        text = " ".join(parts)
        made[f"{text[0].upper()}{text[1:]}."] = True
    return list(made)
