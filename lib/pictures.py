"""
Pictures to look at: tensors <-> images, PNG files, grids, images with their captions, curves.

B images, H height and W width in pixels; an image is (H, W, 3) uint8. Curves need matplotlib and captions need pillow,
which are extras: without them a line of text or a plain grid takes their place.
"""
import struct
import textwrap
import zlib

import numpy as np
import torch

from lib.contrasts import one_sample
from lib.files import atomic_write


def to_tensor(images):
    """(B, H, W, 3) uint8 -> x (B, 3, H, W) float in [-1, 1]."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)         # (B, 3, H, W), a view
    return x.float().div_(127.5).sub_(1)                       # in place: large batches are bound by memory


def to_uint8(x):
    """x (B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8, rounded and clamped."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def write_png(path, image):
    """(H, W, 3) uint8 -> PNG (RFC 2083), replaced as a whole. Our own, so that no image library is required."""
    h, w, _ = image.shape
    rows = np.concatenate([np.zeros((h, 1), np.uint8), image.reshape(h, w * 3)], 1)    # filter type 0 before each row
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)      # 8 bits, RGB
    file = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        file += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    atomic_write(path, lambda f: f.write(file))


def enlarge(images, most):
    """(B, H, W, 3), each pixel repeated to a height of at most `most`; larger images stay as they are."""
    zoom = max(1, most // images.shape[1])
    return images.repeat(zoom, 1).repeat(zoom, 2)


def make_grid(images, columns, pad=2, most=64):
    """(B, H, W, 3) uint8 -> one picture (h, w, 3), rows of `columns`, small images enlarged up to `most` pixels."""
    images = enlarge(np.asarray(images), most)
    rows = -(-len(images) // columns)                          # rounded up
    h, w = images.shape[1] + pad, images.shape[2] + pad
    grid = np.full((rows * h + pad, columns * w + pad, 3), 255, np.uint8)
    for k, image in enumerate(images):
        top, left = k // columns * h + pad, k % columns * w + pad
        grid[top:top + h - pad, left:left + w - pad] = image
    return grid


def contact_sheet(images, captions, columns=4, most=256):
    """(B, H, W, 3) uint8 and B captions -> one picture (h, w, 3), captions beneath; without pillow a grid."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        return make_grid(images, columns, most=most)
    images, font = enlarge(np.asarray(images), most), ImageFont.load_default(13)
    _, height, width, _ = images.shape
    letters = max(8, width // 7)                               # in a line; one is about 7 px wide
    texts = ["\n".join(textwrap.wrap(caption, letters)[:6]) for caption in captions]
    across, down = width + 8, height + 16 * max(text.count("\n") + 1 for text in texts) + 12      # from image to image
    picture = Image.new("RGB", (columns * across, -(-len(images) // columns) * down), "white")
    for k, (image, text) in enumerate(zip(images, texts)):
        left, top = k % columns * across + 4, k // columns * down + 4
        picture.paste(Image.fromarray(image), (left, top))
        ImageDraw.Draw(picture).multiline_text((left, top + height + 2), text, "black", font)
    return np.asarray(picture)


# ---- curves: {label: points}, points being {x: y}


def draw_panels(panels, file, xlabel, ranges=()):
    """
    Save panels side by side as a PNG; each is (title, {label: {x: y}}, settings of its axes). Few points get markers,
    since one alone draws no line. `ranges` are spans of x in grey. Without matplotlib it says so and returns False.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"optional: pip install matplotlib, for the picture {file}")
        return False
    matplotlib.use("Agg")                                      # no window
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3), squeeze=False)
    figure.subplots_adjust(left=0.15 / len(panels), right=1 - 0.04 / len(panels), bottom=0.17, top=0.9, wspace=0.25)
    for panel, (title, curves, settings) in zip(axes[0], panels):
        for label, points in curves.items():
            panel.plot(list(points), list(points.values()), marker="o" if len(points) < 20 else None, ms=3, label=label)
        for low, high in ranges:
            panel.axvspan(low, high, color="0.9", zorder=0)
        panel.set(title=title, xlabel=xlabel, **settings)
        panel.legend(frameon=False)
    atomic_write(file, lambda f: figure.savefig(f, dpi=120, format="png"))
    plt.close(figure)
    return True


def draw_seeds(panels, file):
    """
    Save panels side by side as a PNG: of each label the mean over seeds with its 95 % interval, and a faint line a
    seed. A panel is {"title", "x", "y", "lines": {label: (xs, [a list of ys for each seed])}} and perhaps "names" of
    xs, "levels" {label: y}, "settings" of its axes. Without matplotlib it says so and returns False.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"optional: pip install matplotlib, for the picture {file}")
        return False
    matplotlib.use("Agg")                                      # no window
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 3.6), squeeze=False, layout="constrained")
    for panel, wanted in zip(axes[0], panels):
        for label, (xs, seeds) in wanted["lines"].items():
            means = np.mean(seeds, 0)
            if len(seeds) > 1:
                estimates = [one_sample(column) for column in zip(*seeds)]         # of each x
                halves = [estimate.interval()[1] - estimate.mean for estimate in estimates]
                shown = panel.errorbar(xs, means, halves, marker="o", ms=3, capsize=2, label=label)
                for ys in seeds:
                    panel.plot(xs, ys, color=shown[0].get_color(), alpha=0.25, lw=0.8)
            else:
                panel.plot(xs, means, marker="o", ms=3, label=label)
        for label, y in wanted.get("levels", {}).items():
            panel.axhline(y, color="0.5", ls=":", lw=1)
            panel.annotate(label, (0.01, y), xycoords=("axes fraction", "data"), color="0.4", fontsize=7, va="bottom")
        panel.set(title=wanted["title"], xlabel=wanted["x"], ylabel=wanted["y"], **wanted.get("settings", {}))
        panel.tick_params(which="minor", labelbottom=False)    # of a logarithmic axis: they would lie over each other
        if "names" in wanted:
            panel.set_xticks(range(len(wanted["names"])), wanted["names"])
        panel.legend(frameon=False, fontsize=8)
    atomic_write(file, lambda f: figure.savefig(f, dpi=100, format="png"))
    plt.close(figure)
    return True


def draw_curves(lines, file, bins=("cleanest quarter", "noisiest quarter")):
    """
    Loss and score over steps, from the lines of a log: {"step", "loss", "bins": losses} or {"step", "score": numbers by
    name}, which may be nested. Of several scores dsg is drawn, else the first. `bins` names the first bin and the last.
    """
    losses = {line["step"]: line for line in lines if "loss" in line}              # a repeated step counts once
    scores = {line["step"]: dict(leaves(line["score"])) for line in lines if "score" in line}
    names = [name for score in scores.values() for name in score]
    name = "dsg" if "dsg" in names else names[0] if names else "no score yet"
    left = {"loss": {step: line["loss"] for step, line in losses.items()}}
    left |= {bins[k]: {step: line["bins"][k] for step, line in losses.items()} for k in (0, -1)}
    right = {name: {step: score[name] for step, score in scores.items() if name in score}}
    span = {"xlim": (0, 1.05 * max(losses, default=1))}
    height = {"ylim": (0, 1)} if name == "dsg" else {}
    return draw_panels([("loss", left, span | {"yscale": "log"}), ("score", right, span | height)], file, "step")


def draw_tuning(tuning, file):
    """
    A panel for each metric over guidance, with its chance level where there is one; the range between optima in grey.
    From {"guidance": values, "curves": {metric: values}, "optimum": {metric: guidance}, "range": (low, high) or None}.
    """
    panels = []
    for name, values in tuning["curves"].items():
        if name in ("dsg", "cmmd", "clip_score") or name.startswith(("fd_", "mmd_")):
            curves = {name: dict(zip(tuning["guidance"], values))}
            if f"chance_{name}" in tuning["curves"]:
                curves["chance"] = dict(zip(tuning["guidance"], tuning["curves"][f"chance_{name}"]))
            best = tuning["optimum"].get(name)
            panels.append((name if best is None else f"{name}, lowest at {best:g}", curves, {}))
    if panels and draw_panels(panels, file, "guidance", [tuning["range"]] if tuning["range"] else []):
        print(f"{file}: curves over guidance" + ", between the lowest Frechet distance and the lowest MMD in grey"
              * bool(tuning["range"]))


def leaves(numbers):
    """The (name, number) pairs of nested dicts, in their order."""
    for name, value in numbers.items():
        if isinstance(value, dict):
            yield from leaves(value)
        elif isinstance(value, (int, float)):
            yield name, value
