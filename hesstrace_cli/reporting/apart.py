"""Runs that may not stand in one table or picture, and what sets them apart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Settings = Mapping[str, Any]


def key(run: Mapping[str, Any]) -> str:
    """A text that is the same for the runs that may stand in one table.

    Args:
        run: With its `settings`, where they are known; else its data set and model tell.
    """
    settings = run.get("settings") or {k: run[k] for k in ("dataset", "model")}
    return json.dumps(settings, sort_keys=True, default=str)


def differing(settings: Sequence[Settings]) -> list[str]:
    """The keys that have not the same value in all of them."""
    keys = dict.fromkeys(k for each in settings for k in each)
    return [k for k in keys if any(each.get(k) != settings[0].get(k) for each in settings)]


def settings_text(settings: Settings) -> str:
    """Settings in a line."""
    return ", ".join(f"{key} {_text(value)}" for key, value in settings.items())


def _text(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={each}" for key, each in value.items()) or "none"
    return "none" if value is None else str(value)
