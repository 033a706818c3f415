# SPDX-License-Identifier: Apache-2.0
"""The wrapped backend: everything passes through as it came, unless a layer has a treatment."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_samples import (
    LlamaAttention,
    Shape,
    attention_layer,
    make_module,
    metadata_of,
    text,
    whole,
)
from batches import Backend, StandardBackend, StandardBuilder, StandardImpl, describe, make_builder
from torch import Tensor
from vllm.utils.import_utils import resolve_obj_by_qualname

from attncache_vllm.engine import compat
from attncache_vllm.engine.backend import wrap_backend

METADATA = metadata_of([whole(text(1, 5))])


# -- the class ---------------------------------------------------------------------------------


def test_the_wrapped_backend_is_the_standard_one_but_for_builder_and_implementation() -> None:
    assert issubclass(Backend, StandardBackend)
    assert issubclass(Backend.get_builder_cls(), StandardBuilder)
    assert issubclass(Backend.get_impl_cls(), StandardImpl)
    assert Backend.get_name() == StandardBackend.get_name()
    assert Backend.forward_includes_kv_cache_update is False


def test_a_backend_is_wrapped_once_and_found_by_its_path() -> None:
    # vLLM compares backends by class and resolves them by path in every process.
    path = wrap_backend("batches.StandardBackend")
    assert path == wrap_backend("batches.StandardBackend")
    assert resolve_obj_by_qualname(path) is Backend
    assert Backend.get_builder_cls() is Backend.get_builder_cls()
    assert f"{Backend.__module__}.{Backend.__qualname__}" == path


# -- the implementation ------------------------------------------------------------------------


class Treatment:
    """Has the standard backend answer, then takes a half."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def attend(
        self,
        exact: Callable[..., None],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_metadata: Any,
        output: Tensor,
    ) -> None:
        self.given.append((query, key, value, attn_metadata))
        exact(query, key, value, attn_metadata, output)
        output /= 2


def attend(
    module: LlamaAttention, metadata: Any, *scales: Any, **named_scales: Any
) -> tuple[Tensor, Any]:
    """What the implementation of a module's layer answers, and how the standard one was called."""
    layer: Any = module.attn
    query, key, value = module.heads(text(1, 5), torch.arange(5))
    if metadata is not None:
        layer.impl.do_kv_cache_update(
            layer, key, value, layer.kv_cache, metadata.common.slot_mapping
        )
    output = torch.full_like(query, 9.0)
    forward = functools.partial(
        layer.impl.forward, layer, query, key, value, layer.kv_cache, metadata
    )
    # By keyword as `Attention` calls it, by place as vLLM's subclasses of backends do.
    answer = forward(output, *scales) if scales else forward(output=output, **named_scales)
    assert answer is output
    return output, layer.impl.calls[-1]


@pytest.mark.parametrize("metadata", [METADATA, None], ids=["step", "profiling"])
@pytest.mark.parametrize("treated", [False, True])
def test_a_call_reaches_the_standard_implementation_with_all_it_came_with(
    metadata: Any, treated: bool
) -> None:
    module = make_module()
    if treated:
        module.attn.attncache_scores = Treatment()
    _, seen = attend(module, metadata, output_scale="scale", output_block_scale="block")
    assert seen.scales == ("scale", "block")
    assert seen.metadata is metadata
    _, seen = attend(module, metadata, "scale", "block")
    assert seen.scales == ("scale", "block")


def test_a_layer_without_a_treatment_answers_as_the_standard_backend_does() -> None:
    module = make_module()
    answer, _ = attend(module, METADATA)
    module.attn.impl = StandardImpl(Shape.head_size**-0.5, module.attn.attn_type, None)
    assert torch.equal(answer, attend(module, METADATA)[0])
    assert not (answer == 9.0).any()


def test_the_treatment_of_a_layer_decides_what_is_answered() -> None:
    module, treatment = make_module(), Treatment()
    exact, _ = attend(module, METADATA)
    module.attn.attncache_scores = treatment
    answer, _ = attend(module, METADATA)
    assert torch.equal(answer, exact / 2)
    [(query, key, value, metadata)] = treatment.given
    assert metadata is METADATA
    for given, expected in zip(
        (query, key, value), module.heads(text(1, 5), torch.arange(5)), strict=True
    ):
        assert torch.equal(given, expected)


def test_a_treatment_is_not_asked_while_vllm_profiles() -> None:
    module, treatment = make_module(), Treatment()
    module.attn.attncache_scores = treatment
    answer, _ = attend(module, None)
    assert treatment.given == []
    assert (answer == 9.0).all()


# -- the metadata builder ----------------------------------------------------------------------


def test_the_builder_gives_the_standard_one_what_it_was_given_and_remembers_the_source() -> None:
    layers = {"layer": SimpleNamespace()}
    builder = make_builder(layers)
    spec, names, config, device = builder.given
    assert (spec, names, device) == ("spec", ["layer"], torch.device("cpu"))
    assert config.compilation_config.static_forward_context is layers
    common = describe([3, 2])
    for built, fast in (
        (builder.build(0, common), False),
        (builder.build(0, common, True), True),
        (builder.build(common_prefix_len=0, common_attn_metadata=common, fast_build=True), True),
    ):
        assert built.common is common
        assert built.fast is fast
        assert compat.metadata_source(built) == compat.MetadataSource(builder, common, None)


class AskingBuilder(StandardBuilder):
    """Takes more than others and by name, as some of vLLM's do."""

    def __init__(self, *args: Any, threshold: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.threshold = threshold

    def build(self, *args: Any, accepted: int = 0, **kwargs: Any) -> Any:
        built = super().build(*args, **kwargs)
        built.accepted = accepted
        return built


class AskingBackend(StandardBackend):
    @staticmethod
    def get_builder_cls() -> Any:
        return AskingBuilder


def test_the_builder_passes_on_what_it_does_not_know() -> None:
    wrapped: Any = resolve_obj_by_qualname(wrap_backend(f"{__name__}.AskingBackend"))
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))
    given = {"kv_cache_spec": "spec", "layer_names": ["layer"], "vllm_config": config}
    builder = wrapped.get_builder_cls()(**given, device=torch.device("cpu"), threshold=4)
    assert builder.given == (*given.values(), torch.device("cpu"))
    assert builder.threshold == 4
    common = describe([3, 2])
    built = builder.build(0, common, fast_build=True, accepted=2)
    assert (built.common, built.fast, built.accepted) == (common, True, 2)
    assert compat.metadata_source(built) == compat.MetadataSource(builder, common, None)


def test_the_builder_asks_the_runner_for_the_prompts_of_its_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = [compat.Prompt(30), compat.Prompt(2), compat.Prompt(99)]
    monkeypatch.setattr(compat, "prompts", lambda rows: prompts[:rows])
    found = compat.metadata_source(make_builder().build(0, describe([3, 2])))
    assert found is not None
    assert found.prompts == prompts[:2]


class SharingBuilder(StandardBuilder):
    supports_update_block_table = True


class SharingBackend(StandardBackend):
    @staticmethod
    def get_builder_cls() -> Any:
        return SharingBuilder


def test_the_builder_never_lends_its_metadata_to_another_group() -> None:
    wrapped = resolve_obj_by_qualname(wrap_backend(f"{__name__}.SharingBackend"))
    assert not wrapped.get_builder_cls().supports_update_block_table


def test_the_sequences_of_a_bypassed_engine_are_counted_by_one_of_its_builders() -> None:
    # What else vLLM knows by name (state space, mixture of experts ...) gets no metadata of ours,
    # and neither does a layer whose backend the model chose.
    foreign = SimpleNamespace(impl=StandardImpl)
    layers = {"other": SimpleNamespace(), "foreign": foreign} | {
        name: attention_layer(Shape(), name) for name in ("first", "second")
    }
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    counted: list[compat.MetadataSource] = []
    compat.leave_bypass_counter(config, counted.append)
    builders = [make_builder(layers, [name]) for name in layers]
    common = describe([3, 2])
    for builder in builders:
        builder.build(0, common)
    assert counted == [compat.MetadataSource(builders[2], common, None)]
    assert vars(layers["other"]) == {}


def test_an_engine_without_attention_layers_has_no_counter_left() -> None:
    layers = {"other": SimpleNamespace()}
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    counted: list[compat.MetadataSource] = []
    compat.leave_bypass_counter(config, counted.append)
    make_builder(layers, list(layers)).build(0, describe([3, 2]))
    assert counted == []
