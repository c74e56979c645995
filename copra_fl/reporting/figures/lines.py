"""Curves on the line between two adapters: each pair of adapters thin, the mean over pairs thick."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from copra_fl.reporting.html import Style


def add_lines(
    chart: go.Figure,
    name: str,
    style: Style,
    u: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    mean_only: bool = False,
) -> None:
    """Add one legend entry `name` to `chart`: `curves` by label, each with a value per point `u`, and their mean."""
    if len(curves) > 1 and not mean_only:
        for label, curve in curves.items():
            chart.add_scatter(
                x=u,
                y=curve,
                name=name,
                legendgroup=name,
                showlegend=False,
                mode="lines",
                line={"color": style.color, "width": 1},
                opacity=0.5,
                hovertemplate=f"{label}: %{{y:.4g}}",
            )
    chart.add_scatter(
        x=u,
        y=np.mean(list(curves.values()), axis=0),
        name=name,
        legendgroup=name,
        mode="lines+markers" if mean_only else "lines",
        line={"color": style.color, "width": 2 if mean_only else 4, "dash": style.dash},
        marker={"symbol": style.symbol, "size": 8},
        hovertemplate="mean at u = %{x:.2f}: %{y:.4g}",
    )
