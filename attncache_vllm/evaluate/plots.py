# SPDX-License-Identifier: Apache-2.0
"""Plots of a report as SVG text. They need matplotlib, the package's extra ``plot``."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

# Reproducible files: no date, no random names.
RC: dict[Any, Any] = {
    "svg.hashsalt": "attncache",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def sensitivity(damage: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """Damage of each KV group alone, per layer: one panel for each source.

    ``damage`` gives per source, per layer, a value for each KV group; sources that nothing was
    measured of have no layers, and no panel.
    """
    damage = {source: layers for source, layers in damage.items() if any(layers)}
    with rc_context(RC):
        figure = Figure(figsize=(8, 2.2 * len(damage)), layout="constrained")
        panels = figure.subplots(len(damage), 1, squeeze=False)[:, 0]
        for panel, (source, layers) in zip(panels, damage.items(), strict=True):
            groups = max(map(len, layers))
            for group in range(groups):
                # Layers that cannot be served have no groups.
                values = [layer[group] if layer else math.nan for layer in layers]
                panel.plot(values, marker=".", linewidth=0.8, label=f"KV group {group}")
            panel.set(title=source, ylabel="damage", xlabel="layer", ylim=(0, None))
            if groups <= 8:
                panel.legend(fontsize=7)
        return _svg(figure)


def saving_curve(curve: Mapping[str, Sequence[Mapping[str, Any]]], figure_name: str) -> str:
    """A fidelity figure against the share of KV groups reused, with its interval, per source."""
    with rc_context(RC):
        figure = Figure(figsize=(8, 3), layout="constrained")
        panel = figure.subplots()
        for source, points in curve.items():
            drawn = [point for point in points if point.get(figure_name) is not None]
            if not drawn:
                continue
            shares = [point["groups_share"] for point in drawn]
            panel.plot(shares, [point[figure_name] for point in drawn], marker=".", label=source)
            bounded = [point for point in drawn if figure_name in point.get("ci95", {})]
            low, high = ([point["ci95"][figure_name][side] for point in bounded] for side in (0, 1))
            panel.fill_between([p["groups_share"] for p in bounded], low, high, alpha=0.15)
        panel.set(xlabel="share of KV groups reused", ylabel=figure_name.replace("_", " "))
        if panel.lines:
            panel.legend()
        return _svg(figure)


def canary_errors(canaries: Sequence[Mapping[str, Any]]) -> str:
    """Running error of the canaries per layer, one line for each source."""
    with rc_context(RC):
        figure = Figure(figsize=(8, 2.4), layout="constrained")
        panel = figure.subplots()
        for source in sorted({str(canary["source"]) for canary in canaries}):
            points = sorted(
                (canary["layer"], canary["error"])
                for canary in canaries
                if canary["source"] == source
            )
            panel.plot(*zip(*points, strict=True), marker=".", label=source)
        panel.set(xlabel="layer", ylabel="relative error", ylim=(0, None))
        panel.legend()
        return _svg(figure)


def maps(panels: Mapping[str, NDArray[Any]], title: str) -> str:
    """Maps ``[L, L]`` side by side; brightness is the fourth root, or one column would be all."""
    with rc_context(RC):
        figure = Figure(figsize=(2.7 * len(panels), 2.9), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (name, probs) in zip(axes, panels.items(), strict=True):
            axis.imshow(probs**0.25, cmap="magma", vmin=0, vmax=1)
            axis.set_title(name)
            axis.set_axis_off()
        figure.suptitle(title)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """``figure`` as an ``<svg>`` element to stand inside of HTML."""
    target = io.StringIO()
    figure.savefig(
        target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    text = target.getvalue()
    return text[text.index("<svg") :]
