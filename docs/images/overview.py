"""Draws overview.png, the README's picture, from a page of `tardkd inspect` and the measured precision on BCCD.

python docs/images/overview.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

HERE = Path(__file__).parent
# Of inspect_page.png: the picture of what was taught, and four rows of the table beside it.
TAUGHT = slice(397, 819), slice(19, 582)
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D07C10", "#009E73", "#777777"
ROWS = [
    ("1", GREEN, "class and box", ("true class: teacher 0.56, student 0.29", "IoU: teacher's box 0.86, region 0.53")),
    ("8", ORANGE, "box only", ("true class: both 0.97", "IoU: teacher's box 0.96, region 0.76")),
    ("10", BLUE, "class only", ("true class: teacher 0.91, student 0.87", "IoU: teacher's box 0.91, region 1.00")),
    ("12", GREY, "nothing", ("true class: both 0.84", "IoU: teacher's box 0.96, region 1.00")),
]
PRECISION = [
    ("teacher", 54.7, 0, GREY),
    ("student with\nthe teacher", 51.7, 0.7, GREEN),
    ("student\nalone", 48.7, 1.0, BLUE),
]


def main() -> None:
    plt.rcParams["font.size"] = 9
    figure = plt.figure(figsize=(11, 3.9), dpi=130, facecolor="white")
    page = plt.imread(HERE / "inspect_page.png")

    picture = figure.add_axes((0.005, 0.03, 0.44, 0.86))
    picture.imshow(page[TAUGHT])
    picture.set_axis_off()
    picture.set_title("Regions of one image", loc="left", fontsize=10)

    words = figure.add_axes((0.46, 0.03, 0.28, 0.86))
    words.set_axis_off()
    words.set_title("What the gates open there", loc="left", fontsize=10)
    for place, (number, colour, what, why) in enumerate(ROWS):
        top = 0.97 - 0.25 * place
        box = dict(boxstyle="square,pad=0.25", facecolor=colour, edgecolor="none")
        words.text(0.04, top, number, color="white", va="top", ha="center", weight="bold", bbox=box)
        words.text(0.11, top, what, color=colour, va="top", weight="bold", fontsize=10)
        words.text(0.11, top - 0.075, "\n".join(why), va="top", fontsize=8.5, color="#333333")

    points = figure.add_axes((0.81, 0.17, 0.18, 0.72))
    for place, (_, value, spread, colour) in enumerate(PRECISION):
        points.errorbar(value, place, xerr=spread or None, fmt="o", markersize=8, capsize=4, color=colour)
        points.text(value, place + 0.14, f"{value} ± {spread}" if spread else f"{value}", ha="center", va="bottom")
    points.set(xlim=(46, 57), ylim=(2.6, -0.6), yticks=range(3), yticklabels=[name for name, *_ in PRECISION])
    points.invert_yaxis()
    points.set_xlabel("AP in percent, three seeds", fontsize=8.5)
    points.set_title("BCCD's test images", loc="left", fontsize=10)
    points.spines[["top", "right"]].set_visible(False)
    points.grid(axis="x", color="#DDDDDD")

    out = HERE / "overview.png"
    figure.savefig(out)
    Image.open(out).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main()
