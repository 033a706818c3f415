# SPDX-License-Identifier: Apache-2.0
"""What all settings share: frozen pydantic models, YAML files, and one line for all mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from attncache_vllm.errors import SettingsError


class FrozenSettings(BaseModel):
    """Settings that cannot be changed, with no unknown keys and no conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file; ``SettingsError`` if it cannot be read."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"the settings file must be readable: {error.strerror}, got {str(path)!r}. Relative "
            "paths are taken from the folder that the command was started in."
        ) from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"the settings file {str(path)!r} must be UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"the settings file {str(path)!r} is not valid YAML: {error}") from None


def explain(
    error: ValidationError, origin: str, known: type[BaseModel], nested: Sequence[type[BaseModel]]
) -> str:
    """All mistakes in one line: key, rule and value of each.

    Args:
        error: what pydantic found.
        origin: where the settings came from.
        known: the model whose fields an unknown key is compared with.
        nested: the models of the fields below, if it has any.
    """
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            models = [known] if len(item["loc"]) == 1 else nested
            names = ", ".join(name for model in models for name in model.model_fields)
            lines.append(f"unknown setting {key!r}, got {item['input']!r}; known: {names}")
        elif item["type"] == "missing":
            lines.append(f"setting {key!r} is required, got {item['input']!r}; add it")
        else:
            rule = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"setting {key!r}: {rule}, got {item['input']!r}")
    return f"invalid attncache settings in {origin}: " + "; ".join(lines)
