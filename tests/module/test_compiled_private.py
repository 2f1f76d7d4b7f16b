"""Each private name of torch that tells of compiled modules is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import nn

from harness.support.torch_private import NAMES, OVERRIDDEN, donates_buffers, is_compiled


def test_a_compiled_module_is_known_by_either_name() -> None:
    plain, in_place = nn.Linear(1, 1), nn.Linear(1, 1)
    assert not is_compiled(plain)
    in_place.compile()
    assert is_compiled(in_place)
    assert in_place._compiled_call_impl is not None  # type: ignore[truthy-function]
    wrapped = torch.compile(plain)
    assert hasattr(wrapped, "_orig_mod")
    assert is_compiled(wrapped)


@pytest.mark.parametrize("donates", [False, True])
def test_the_setting_of_donated_buffers_is_read(donates: bool) -> None:
    assert hasattr(functorch_config, "donated_buffer")
    with functorch_config.patch(donated_buffer=donates):
        assert donates_buffers() is donates


def test_conversions_call_what_is_overridden() -> None:
    assert OVERRIDDEN == ("_apply",)
    called: list[bool] = []

    class Overriding(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            called.append(recurse)
            return super()._apply(fn, recurse)

    module = Overriding(1, 1)
    for convert in (module.float, module.double, module.half, module.cpu):
        convert()
    module.to(torch.float64)
    assert len(called) == 5


def test_every_name_is_tested() -> None:
    assert NAMES == ("_orig_mod", "_compiled_call_impl", "donated_buffer")
