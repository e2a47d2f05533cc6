"""The method in one picture: a meta model, hybrids, the assembled network, fine-tuning."""

from incubate_lib.report.live.picture import INK, Picture

MODULES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito's
FROZEN, GREY = "#D0D0D0", "#777777"
LAYERS = 3  # of a target module; a meta module has one
LAYER, GAP, HEIGHT, ROW = 15, 5, 34, 46  # pixels
TOP = 78  # of the rows
WIDTHS = (240, 262, 262, 216)  # of the four steps
WORDS = (
    ("1  Meta model", "a few layers, trained first"),
    ("2  Hybrids", "one module trains, grey is frozen"),
    ("3  Assembled", "the modules, put together"),
    ("4  Fine-tuned", "the whole network, briefly"),
)


def method() -> Picture:
    """Return the four steps, side by side, for four modules."""
    about = (
        "Train a small meta model; train each module of the deep network inside it while it is frozen; put the modules together; "
    )
    picture = Picture(about + "fine-tune the whole.", width=sum(WIDTHS) + 30, height=TOP + len(MODULES) * ROW + 44)
    left = 20
    for (title, words), width in zip(WORDS, WIDTHS, strict=True):
        picture.text(left, 30, title, size=16, bold=True)
        picture.text(left, 50, words, size=12, color=GREY)
        left += width
    middle = TOP + (len(MODULES) - 1) / 2 * ROW
    starts = [20 + sum(WIDTHS[:i]) for i in range(len(WIDTHS))]
    _chain(picture, starts[0], middle, [(1, color) for color in MODULES])
    for i, color in enumerate(MODULES):
        parts = [(LAYERS, color) if i == j else (1, FROZEN) for j in range(len(MODULES))]
        _chain(picture, starts[1], TOP + i * ROW, parts)
    whole = [(LAYERS, color) for color in MODULES]
    _chain(picture, starts[2], middle, whole)
    end = _chain(picture, starts[3], middle, whole)
    picture.box(starts[3] - 7, middle - 8, end - starts[3] + 14, HEIGHT + 16, fill="none", edge=INK, dashed=True)
    for start in starts[1:]:
        _arrow(picture, start - 36, start - 16, middle + HEIGHT / 2)
    foot = TOP + len(MODULES) * ROW + 22
    picture.text(starts[1], foot, "side by side, each on its own machine if you like", size=12, color=GREY)
    return picture


def _chain(picture: Picture, x: float, y: float, parts: list[tuple[int, str]]) -> float:
    """Draw modules one behind the other, each of some layers; return where they end."""
    for layers, color in parts:
        for _ in range(layers):
            picture.box(x, y, LAYER, HEIGHT, fill=color, edge="white", radius=3)
            x += LAYER
        x += GAP
    return x - GAP


def _arrow(picture: Picture, start: float, end: float, y: float) -> None:
    picture.line([(start, y), (end, y)], width=2)
    picture.line([(end - 6, y - 5), (end, y), (end - 6, y + 5)], width=2)
