"""The pictures of the demo page, as SVG text that takes its colours from the page.

Matplotlib draws with one placeholder colour per role; in the SVG each becomes a CSS variable, so that one drawing
serves light and dark.  Figures are as wide as a phone, text stays text, and nothing outside the SVG is referred to.
"""
from __future__ import annotations

import functools
import io
import re

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kvbench.demo.measurement import Outcome
from kvbench.reference import block_gtq, rotation

# role -> the colour it is drawn with, and what that becomes on a light and on a dark page
ROLES = {
    "ink": ("#010101", "#1c2733", "#dbe4ee"),
    "faint": ("#020202", "#aab4bf", "#4d5966"),
    "first": ("#030303", "#0b62a8", "#6cb6ff"),
    "second": ("#040404", "#b3470b", "#ff9f5a"),
    "third": ("#050505", "#2b7a3f", "#6fd08c"),
    "fourth": ("#060606", "#7a3fd0", "#c297ff"),
    "fifth": ("#070707", "#b3261e", "#ff8a80"),
    "sixth": ("#080808", "#0f7683", "#5fd3dc"),
    "seventh": ("#090909", "#8a6100", "#e3b341"),
    "eighth": ("#0a0a0a", "#b02f80", "#f778ba"),
}
INK, FAINT, *SERIES = (drawn for drawn, _, _ in ROLES.values())
LOOK = {
    "font.size": 10, "axes.titlesize": 10, "legend.fontsize": 9, "legend.frameon": False, "legend.labelcolor": INK,
    "text.color": INK, "axes.labelcolor": INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT, "grid.color": FAINT, "grid.linewidth": 0.4,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none", "figure.facecolor": "none",
    "svg.fonttype": "none",
}
WIDTH_INCHES = 4.5
TOKENS_SHOWN = 256


def colours(theme: str) -> str:
    """CSS declarations of the colours; theme is "light" or "dark"."""
    return " ".join(f"--{role}: {colour[1 if theme == 'light' else 2]};" for role, colour in ROLES.items())


def picture(draw):
    """Makes a function that returns (figure, caption) return (SVG element, caption)."""
    @functools.wraps(draw)
    def drawn(*arguments):
        with matplotlib.rc_context(LOOK | {"svg.hashsalt": draw.__name__}):
            figure, caption = draw(*arguments)
            return _svg(figure), caption
    return drawn


def standalone(svg: str) -> str:
    """The element as a file of its own, light or dark as the reader's system is."""
    style = (f"svg {{ {colours('light')} background: #ffffff; }} "
             f"@media (prefers-color-scheme: dark) {{ svg {{ {colours('dark')} background: #12161b; }} }} "
             "text { font-family: system-ui, sans-serif !important; }")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    opening, closing, content = svg.partition(">")
    return f"{opening.replace('<svg', f'<svg {names}', 1)}{closing}<style>{style}</style>{content}\n"


@picture
def keys_before_and_after_rotation(keys: np.ndarray):
    """Magnitudes of keys [tokens, head_dim] by token and channel, as they are and rotated."""
    keys = keys.astype(np.float64)
    head_dim = keys.shape[1]
    rotated = rotation.rotate(keys, rotation.hadamard(head_dim, seed=0))
    shown = np.linspace(0, len(keys) - 1, TOKENS_SHOWN).astype(int)
    brightest = np.quantile(np.abs(keys), 0.999)
    rms = [np.sqrt(np.mean(x**2, axis=0)) for x in (keys, rotated)]
    # What a scale per token pays for: the largest coordinate in units of the root mean square one.
    crest = [float(np.median(np.abs(x).max(axis=1) / np.sqrt(np.mean(x**2, axis=1)))) for x in (keys, rotated)]

    figure = Figure(figsize=(WIDTH_INCHES, 3.9), layout="constrained")
    axes = figure.subplots(2, 2, height_ratios=(3, 1), sharex=True, sharey="row")
    for (image, bars), x, channel_rms, title in zip(axes.T, (keys, rotated), rms, ("keys as they are", "rotated")):
        image.imshow(np.abs(x[shown]), aspect="auto", cmap="viridis", vmin=0, vmax=brightest, interpolation="nearest",
                     extent=(-0.5, head_dim - 0.5, len(keys), 0))
        image.set_title(title)
        bars.bar(np.arange(head_dim), channel_rms, color=SERIES[0])
        bars.set_xlabel("channel")
    axes[0, 0].set_ylabel("token")
    axes[1, 0].set_ylabel("RMS")

    largest = set(np.argsort(-rms[0])[:3].tolist())
    pairs = [(c, c + head_dim // 2) for c in sorted(largest) if c + head_dim // 2 in largest]
    turning = "".join(f"({low} and {high} are one RoPE pair: its energy turns from one to the other along the text.) "
                      for low, high in pairs)
    caption = (f"Magnitude of the keys (bright is large), below it the root mean square of each channel. As they are, "
               f"channels {_and(sorted(largest))} stand out: up to {rms[0].max():.1f} where the median channel has "
               f"{np.median(rms[0]):.1f}. {turning}A rotation changes no inner product and spreads them: "
               f"{rms[1].max():.1f} and {np.median(rms[1]):.1f}. In the median token the largest coordinate falls from "
               f"{crest[0]:.1f} to {crest[1]:.1f} times the root mean square one, and the step of a quantiser falls "
               f"with it.")
    return figure, caption


@picture
def attention_mass(mass: np.ndarray):
    """Where attention goes: mass [heads, tokens], each row summing to 1."""
    heads, tokens = mass.shape
    edges = np.concatenate([[0, 1], np.linspace(64, tokens, tokens // 64).astype(int)])
    ranked = np.cumsum(np.sort(mass)[:, ::-1], axis=1)

    figure = Figure(figsize=(WIDTH_INCHES, 4.6), layout="constrained")
    by_position, by_rank = figure.subplots(2, 1)
    for head, colour in zip(range(heads), SERIES * heads):
        by_position.stairs(np.add.reduceat(mass[head], edges[:-1]), edges, color=colour, label=f"query head {head}",
                           baseline=None)
        by_position.plot([0], [mass[head, 0]], "o", color=colour, markersize=4)
        by_rank.plot(np.arange(1, tokens + 1), ranked[head], color=colour, linewidth=1.4)
    by_position.set(yscale="log", ylim=(1e-4, 1), xlabel="token", ylabel="mass per 64 tokens")
    by_position.yaxis.set_major_formatter("{x:g}")
    by_position.legend(ncols=heads, loc="lower center", bbox_to_anchor=(0.5, 1), handlelength=1.2, columnspacing=1)
    by_rank.axhline(0.85, color=FAINT, linewidth=1)
    by_rank.set(xscale="log", xlim=(1, tokens), ylim=(0, 1.02), xlabel="tokens, heaviest first", ylabel="mass")
    by_rank.xaxis.set_major_formatter("{x:g}")

    needed = [int(np.searchsorted(row, 0.85)) + 1 for row in ranked]
    sinks = _and(f"{share:.0%}" for share in mass[:, 0])
    caption = (f"Softmax mass of the {tokens} tokens, mean over the decode steps. Above: by position; the dots are "
               f"token 0, the attention sink, which takes {sinks}. Below: how few tokens hold how much; {_and(needed)} "
               f"of them hold 85 %.")
    return figure, caption


@picture
def allocated_bits(keys: np.ndarray):
    """Energy of the RoPE blocks of keys [tokens, head_dim], and the bits that Block-GTQ gives them, 3 on average."""
    calibration = block_gtq.calibrate(keys[None, None], pairing="half")
    energy = calibration.key_energy[0]
    blocks = np.arange(len(energy))
    bits = {tile: block_gtq.plan(calibration, 3.0, tile=tile).bits[0] for tile in (2, 32)}

    figure = Figure(figsize=(WIDTH_INCHES, 3.9), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.bar(blocks, energy, color=SERIES[0])
    above.set(yscale="log", ylabel="energy of the keys")
    below.bar(blocks, bits[32], color=SERIES[1], label="in tiles of 32 coordinates")
    below.stairs(bits[2], np.append(blocks - 0.5, len(blocks) - 0.5), color=INK, label="each block for itself")
    below.axhline(3, color=FAINT, linewidth=1)
    below.set(xlabel="RoPE block, fastest first", ylabel="bits per coordinate")
    below.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1), handlelength=1.2, columnspacing=1)
    largest, least = energy.max() / np.median(energy), energy.min() / np.median(energy)
    caption = (f"How Block-GTQ spends 3 bits per coordinate on the {len(blocks)} RoPE blocks of the prompt's keys. "
               f"Above: their energy, from {least:.2g} to {largest:.2g} times the median. Below: bits, one more for "
               f"every factor of four; blocks of equal bits are rotated together and share a scalar, so that tiles, "
               f"of which there are fewer, cost fewer bytes.")
    return figure, caption


@picture
def bytes_against_error(outcomes: list[Outcome]):
    """Every preset as a point: bytes held per token against the error of the attention output."""
    points: dict[tuple[float, float], list[str]] = {}       # presets that hold and lose the same share one point
    for outcome in outcomes:
        place = float(f"{outcome.bytes_per_token:.3g}"), float(f"{outcome.output_error:.2g}")
        points.setdefault(place, []).append(outcome.preset)

    figure = Figure(figsize=(WIDTH_INCHES, 3.9), layout="constrained")
    axis = figure.subplots()
    axis.set(yscale="log", xlabel="bytes held per token", ylabel="output error")
    axis.set_xscale("log", base=2)
    for number, (place, presets) in enumerate(sorted(points.items())):
        axis.plot(*zip(place), "o", color=SERIES[0], markersize=6)
        axis.annotate(", ".join(presets), place, xytext=(0, 12 if number % 2 else -12), textcoords="offset points",
                      ha="center", va="center")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(0.3)
    axis.grid(True, which="major")
    caption = ("Relative error of the attention output against float64, over the bytes that the cache holds. Lower "
               "left is better. Exact presets lose what rounding the output to float16 loses.")
    return figure, caption


def _and(items) -> str:
    *first, last = [str(item) for item in items]
    return f"{', '.join(first)} and {last}" if first else last


def _svg(figure: Figure) -> str:
    """An <svg> element for HTML: colours by role, no fixed size, and no identifier but those that it refers to."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]+"', text).group(0)
    content = text[text.index(">", text.index("<svg")) + 1:].strip()
    for role, (drawn, _, _) in ROLES.items():
        content = content.replace(drawn, f"var(--{role})")
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', content))
    content = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", content)
    return f'<svg {box} role="img">{content}'
