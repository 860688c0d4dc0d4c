"""The Grafana dashboard: one page for the runs that are chosen on top of it."""

from __future__ import annotations

from typing import Any

from trainer.metrics.prometheus.panels import ROWS, RUN, Panel

_WIDTH = 24
"""Columns of Grafana's grid."""
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> dict[str, Any]:
    """What Grafana imports: a choice of data source, runs and ranks, and the panels."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        place = {"x": 0, "y": y, "w": _WIDTH, "h": 1}
        panels.append({"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "gridPos": place,
                       "panels": []})  # fmt: skip
        y, x, height = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > _WIDTH:
                y, x, height = y + height, 0, 0
            place = {"x": x, "y": y, "w": panel.width, "h": panel.height}
            panels.append({"id": len(panels) + 1, "gridPos": place, **_drawn(panel)})
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return {
        "uid": "shardwright",
        "title": "Shardwright",
        "description": "Training runs that answer Prometheus (logger=[prometheus]).",
        "tags": ["shardwright", "training"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": [_alerts_as_marks()]},
        "templating": {"list": _variables()},
        "links": [],
        "panels": panels,
    }


def _variables() -> list[dict[str, Any]]:
    def values_of(label: str, selector: str, title: str) -> dict[str, Any]:
        query = f"label_values(shardwright_world_size{selector}, {label})"
        return {
            "name": label, "label": title, "type": "query", "datasource": _SOURCE, "definition": query,
            "query": {"query": query, "refId": label}, "refresh": 2, "sort": 3, "multi": True, "includeAll": True,
            "allValue": ".+", "current": {"text": ["All"], "value": ["$__all"]},
        }  # fmt: skip

    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}}
    return [source, values_of("run", "", "Run"), values_of("rank", RUN, "Rank")]


def _alerts_as_marks() -> dict[str, Any]:
    return {
        "name": "Alerts", "enable": True, "iconColor": "red", "datasource": _SOURCE,
        "expr": 'ALERTS{alertstate="firing",alertname=~"Shardwright.+",run=~"$run"}', "titleFormat": "{{alertname}}",
        "textFormat": "{{run}} {{rank}}", "step": "30s",
    }  # fmt: skip


def _drawn(panel: Panel) -> dict[str, Any]:
    instant = panel.kind != "timeseries"
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "editorMode": "code",
            "expr": expression,
            "legendFormat": legend,
            "instant": instant,
            "range": not instant,
            **({"format": "table"} if panel.kind == "table" else {}),
        }
        for index, (legend, expression) in enumerate(panel.curves.items())
    ]
    found: dict[str, Any] = {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.help,
        "datasource": _SOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": {"unit": panel.unit, "thresholds": _thresholds(panel)}, "overrides": []},
        "options": {},
    }
    if panel.kind == "timeseries":
        found["fieldConfig"]["defaults"]["custom"] = {
            "drawStyle": "line", "lineWidth": 1, "fillOpacity": 30 if panel.stacked else 0, "showPoints": "never",
            "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
            "scaleDistribution": {"type": "log", "log": 10} if panel.log else {"type": "linear"},
            "thresholdsStyle": {"mode": "off" if len(_thresholds(panel)["steps"]) == 1 else "line"},
        }  # fmt: skip
        found["options"] = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    if panel.kind == "stat":
        found["options"] = {
            "colorMode": "value" if len(_thresholds(panel)["steps"]) > 1 else "none", "graphMode": "none",
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False, "fields": ""}, "textMode": "auto",
        }  # fmt: skip
    if panel.kind == "table":
        hidden = dict.fromkeys(("Time", "Value", "__name__", "job"), True)
        found["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return found


def _thresholds(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    if panel.bad_above is not None:
        steps.append({"color": "red", "value": panel.bad_above})
    if panel.bad_below is not None:
        steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.bad_below}]
    return {"mode": "absolute", "steps": steps}
