# SPDX-License-Identifier: Apache-2.0
"""Write the tables of ``docs/settings.md`` that are made from the code: ``python docs/tables.py``.

A table stands between ``<!-- NAME -->`` and ``<!-- end of NAME -->``. ``tests/test_docs.py`` fails
while the page is not what this script would write.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attncache_vllm.config import RecordSettings, Settings
from attncache_vllm.engine import metrics

PAGE = Path(__file__).with_name("settings.md")
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {
    "number": "number",
    "integer": "integer",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
}


def settings_table(model: type[Settings] | type[RecordSettings]) -> str:
    """One row for each field: name, what it accepts, its default, its description."""
    schema = model.model_json_schema()
    rows = []
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _code(field["default"])
        rows.append((f"`{name}`", _accepted(field), default, field["description"]))
    return _table(("setting", "accepts", "default", "meaning"), rows)


def metrics_table() -> str:
    """One row for each Prometheus collector of the plugin."""
    rows = []
    for collector in vars(metrics).values():
        if not hasattr(collector, "_documentation"):
            continue
        name = collector._name + ("_total" if collector._type == "counter" else "")
        label = ", ".join(f"`{label}`" for label in collector._labelnames) or "-"
        rows.append((f"`{name}`", collector._type, label, collector._documentation))
    return _table(("metric", "type", "labels", "meaning"), rows)


def with_tables(page: str) -> str:
    """``page`` with its generated tables written anew."""
    tables = {
        "settings": settings_table(Settings),
        "record settings": settings_table(RecordSettings),
        "metrics": metrics_table(),
    }
    for name, table in tables.items():
        place = re.compile(rf"<!-- {name} -->\n.*?<!-- end of {name} -->", re.DOTALL)
        written = f"<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->"
        # A function, because a replacement string would have its backslashes interpreted.
        page, found = place.subn(lambda _, written=written: written, page)
        if found != 1:
            raise ValueError(f"the page must have one place for the table {name!r}, got {found!r}")
    return page


def _accepted(field: dict[str, Any]) -> str:
    """``"integer >= 1, <= 1024"`` and the like, from a field's JSON schema."""
    if "anyOf" in field:
        return " or ".join(map(_accepted, field["anyOf"]))
    if "$ref" in field:
        return "object"
    if "enum" in field:
        return " or ".join(map(_code, field["enum"]))
    if field["type"] == "array":
        return f"list of {_accepted(field['items'])}"
    if field.get("format") == "path":
        return "path"
    bounds = (f"{sign} {field[key]:g}" for key, sign in _BOUNDS.items() if key in field)
    return f"{_TYPES[field['type']]} {', '.join(bounds)}".rstrip()


def _code(value: object) -> str:
    return f"`{json.dumps(value)}`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
