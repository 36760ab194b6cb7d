"""Makes examples/crowd.jpg, the sample picture: one public-domain portrait (NASA's photograph of Eileen Collins, `astronaut`
in scikit-image) at many sizes, the smallest faces 8 pixels high.

    pip install scikit-image pillow
    python examples/crowd.py
"""

import os

import numpy as np
from PIL import Image
from skimage import data

WIDTH, HEIGHT = 1280, 720
# Head and shoulders in the photograph, and the height of the face there, pixels.
LEFT, TOP, SIDE, FACE = 110, 20, 230, 125
# Height of the faces of every row, from the back to the front.
ROWS = [8, 10, 13, 17, 22, 29, 38, 50, 66, 84]


def main():
    rng = np.random.default_rng(1)
    portrait = Image.fromarray(data.astronaut()).crop((LEFT, TOP, LEFT + SIDE, TOP + SIDE))
    canvas = Image.new("RGB", (WIDTH, HEIGHT), (96, 104, 112))
    y = 6
    for face in ROWS:
        side = round(SIDE * face / FACE)
        step = side + max(2, side // 10)
        for x in range((WIDTH % step) // 2, WIDTH - side + 1, step):
            tile = portrait.resize((side, side), Image.LANCZOS)
            if rng.random() < 0.5:
                tile = tile.transpose(Image.FLIP_LEFT_RIGHT)
            tile = np.asarray(tile, dtype=np.float32) * rng.uniform(0.6, 1.15, 3).mean() + rng.uniform(-12, 12)
            canvas.paste(Image.fromarray(tile.clip(0, 255).astype(np.uint8)), (x, y))
        y += step
        if y >= HEIGHT:
            break
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "crowd.jpg")
    canvas.save(path, quality=85, optimize=True)
    print(path, canvas.size, os.path.getsize(path), "bytes; rows end at", y)


main()
