"""Makes the tokenizer of the tiny model: `python training/make_tokenizer.py [tokenizer.json]`.

The tokenizer is a byte-level BPE (arXiv 1508.07909 on UTF-8 bytes). Any text is a sequence of its 256 base tokens, so
<unk> never occurs. The merges cover the words of the tiny model's training captions. Special ids and the closing </s>
are UMT5's. The result is deterministic: every run writes the same file, in under a second.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import cycle, product
from pathlib import Path
from string import ascii_uppercase

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

ASSET = Path(__file__).parents[1] / "wanfast/assets/tiny/tokenizer/tokenizer.json"
VOCAB_SIZE = 960
SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]  # ids 0, 1, 2


def phrases(text: str) -> list[str]:
    """Returns the phrases of a comma-separated text."""
    return [" ".join(phrase.split()) for phrase in text.split(",")]


SIZES = phrases("small, tiny, little, big, large, huge, medium-sized")
COLOURS = phrases("""
red, green, blue, yellow, orange, purple, pink, cyan, magenta, brown, black, white, grey, gray, golden, silver, teal,
violet, navy, olive, lime, maroon, beige, crimson, turquoise, dark, light, bright, pale
""")
SHAPES = phrases("""
circle, square, star, triangle, letter, ring, cross, heart, diamond, rectangle, hexagon, pentagon, ellipse, oval,
arrow, ball, disc, dot, box, shape, object, figure
""") + [f"letter {letter}" for letter in ascii_uppercase]
VERBS = phrases("moves, slides, drifts, goes, travels, heads, glides, floats, shifts, wanders")
MOTIONS = [
    *(f"{verb} {way}" for verb, way in product(VERBS, phrases("right, left, up, down"))),
    *(f"moves to the {side}" for side in phrases("right, left, top, bottom, centre, center, corner, edge")),
    *(f"moves {way}" for way in phrases("upward, downward, leftward, rightward, forward, backward")),
    *(f"moves {way}" for way in phrases("upwards, downwards, forwards, backwards, sideways")),
    *(f"moves {way}" for way in phrases("diagonally, horizontally, vertically, in a circle, around the middle")),
    *phrases("""
    stands still, does not move, stays in place, remains motionless, rests, stops, grows, shrinks, gets bigger,
    gets smaller, expands, contracts, enlarges, spins, rotates clockwise, rotates counterclockwise, turns around,
    twirls, revolves, circles, orbits the centre, loops, bounces, jumps, hops, falls, rises, sinks, rolls, flies,
    zigzags, swings back and forth, shakes, wobbles, vibrates, pulses, appears, disappears, fades away
    """),
]
CAMERA = phrases("""
, The camera pans right., The camera pans left., The camera pans up., The camera pans down., The camera zooms in.,
The camera zooms out., The camera is still., Static shot., A slow zoom., A fast pan.
""")
BACKGROUNDS = [
    *(f"on a {colour} background" for colour in COLOURS),
    *phrases("on a plain background, in front of a gradient, over a checkerboard, over stripes, across the frame"),
]
MANNERS = phrases(", slowly, quickly, smoothly, fast, gently, twice, again and again")

GENERAL = """
A cat and a dog walk along the beach at sunset while the waves roll in behind them. The woman looks at the viewer and
smiles. A man with a hat is running through the forest. Summer beach vacation style, a white cat wearing sunglasses
sits on a surfboard. The video shows two people talking at a table in the city at night. Birds fly over the mountain,
the lake and the river. There is light from the window, water, fire, smoke, snow, rain, clouds, sky, grass, trees and
flowers. First it opens, then it closes, and after that it comes back with the other one. One, two, three, four, five
objects. The image has high quality, soft focus, natural lighting, cinematic colours, close-up, wide angle, depth of
field. Their hands and faces are not blurred; nothing else is moving in this scene, but something will change its shape.
"""


def captions() -> Iterator[str]:
    """Yields captions of every size, colour and shape; motion, manner, background and camera take turns."""
    motions, manners, backgrounds, cameras = map(cycle, (MOTIONS, MANNERS, BACKGROUNDS, CAMERA))
    for size, colour, shape in product(SIZES, COLOURS, SHAPES):
        phrase = f"{colour} {shape} {next(motions)} {next(manners)}".strip()
        yield f"A {size} {phrase} {next(backgrounds)}. {next(cameras)}".strip()
        yield f"the {phrase}, and a {size} {shape} moves with it"
    yield from [GENERAL.replace("\n", " ")] * 20


def make_tokenizer() -> Tokenizer:
    """Returns a tokenizer of exactly VOCAB_SIZE tokens."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions(), trainer)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


if __name__ == "__main__":
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ASSET
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(path), pretty=False)
    print(f"{path}: {tokenizer.get_vocab_size()} tokens, {path.stat().st_size} bytes")
