# SPDX-License-Identifier: Apache-2.0
"""What offline work puts into a loaded model in place of reuse: recording, and calibration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from attncache_vllm.config import RecordSettings, Settings
from attncache_vllm.engine import compat
from attncache_vllm.engine.eligibility import reach_of, reaches_of
from attncache_vllm.engine.memory import keep_freed_memory
from attncache_vllm.engine.modules import AttentionModule, feature_module
from attncache_vllm.engine.record import Recorder, RecordModule, RecordScores, activate
from attncache_vllm.errors import SettingsError
from attncache_vllm.reuse.plan import Plan
from attncache_vllm.store.local import LocalStore
from attncache_vllm.store.manifest import FILE_NAME as MANIFEST_NAME
from attncache_vllm.store.manifest import Manifest
from attncache_vllm.store.protocol import Namespace

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = compat.get_logger(__name__)

# The row that a pooling of vLLM's takes alone.
READ_ROWS = {"CLS": 0, "LAST": -1}


def attach_recording(
    modules: list[AttentionModule],
    vllm_config: VllmConfig,
    settings: Settings,
    namespace: Namespace,
) -> None:
    from attncache_vllm.engine import ops

    assert settings.record is not None
    wanted = [found for found in modules if found.index in settings.record.layers]
    missing = sorted(set(settings.record.layers) - {found.index for found in wanted})
    if missing:
        raise SettingsError(
            f"layers to record must be attention layers of the model, got {missing!r}; it has "
            f"{[found.index for found in modules]!r}"
        )
    reaches = {found.index: reach_of(found, vllm_config) for found in wanted}
    for index, reach in reaches.items():
        if reach.skips == "nothing":
            raise SettingsError(
                f"layer {index} cannot be recorded: {reach.reason}; leave it out with --layers"
            )
    feature = feature_module(modules, settings.record.feature_layer)
    keep_freed_memory()
    store = _open_for_recording(settings.folder, settings.record, namespace)
    layouts = {found.index: found.layout for found in wanted}
    recorder = Recorder(store, settings.record, feature.name, layouts)
    for found in wanted:
        found.attention.attncache_scores = RecordScores(found, recorder)
        if reaches[found.index].skips == "module":
            ops.replace_forward(found, RecordModule(found, recorder))
    ops.observe_input(feature, recorder.observe)
    activate(recorder)
    logger.info("attncache: recording layers %s into %s", settings.record.layers, settings.folder)


def attach_calibration(
    modules: list[AttentionModule],
    vllm_config: VllmConfig,
    settings: Settings,
    namespace: Namespace,
) -> None:
    from attncache_vllm.engine import calibrate, ops

    with LocalStore.open(settings.folder, namespace=namespace) as store:
        feature = feature_module(modules, Plan.from_dict(store.plan).feature_layer)
    reaches = reaches_of(modules, vllm_config, namespace.num_layers)
    # A step begins at the feature layer: nothing before it is served.
    layers = [
        found
        for found in modules
        if reaches[found.index].skips != "nothing" and found.index >= feature.index
    ]
    pooling = vllm_config.model_config.pooler_config.seq_pooling_type
    calibrator = calibrate.Calibrator(feature.name, layers, READ_ROWS.get(pooling))
    for found in layers:
        found.attention.attncache_scores = calibrate.CalibrateScores(found, calibrator)
    ops.observe_input(feature, calibrator.observe)
    calibrate.activate(calibrator)


def check_begun_with(manifest: Manifest, record: RecordSettings) -> None:
    asked = record.model_dump(mode="json")
    if manifest.build != asked:
        raise SettingsError(
            f"a store is extended with the settings it was begun with, {manifest.build!r}, "
            f"got {asked!r}; give the same ones or another --store"
        )


def _open_for_recording(path: Path, record: RecordSettings, namespace: Namespace) -> LocalStore:
    if not (path / MANIFEST_NAME).exists():
        return LocalStore.create(path, namespace, record.model_dump(mode="json"))
    check_begun_with(Manifest.read(path), record)
    return LocalStore.open(path, writable=True, namespace=namespace)
