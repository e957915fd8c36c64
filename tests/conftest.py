"""Settings that hold for all tests, and three ways to run them as another machine would."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.support.crosses import spread

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--target", help="compile for this target where a test names none")
    parser.addoption(
        "--jitter",
        action="store_true",
        help="disturb the last bits of torch's products, as other CPUs and memory alignments do",
    )
    parser.addoption(
        "--arm", action="store_true", help="compile kernels for ARM, and run them under qemu"
    )
    parser.addoption(
        "--arm-extras", action="store_true", help="with --arm: of a later CPU, with dot products"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--arm"):
        from tests.support import arm

        if missing := arm.missing():
            raise pytest.UsageError(
                f"--arm needs {' and '.join(missing)}: `make test-arm` installs them on Debian."
            )
        arm.install(config.getoption("--arm-extras"))
    if name := config.getoption("--target"):
        from hf_sparse.runtime.llvm import target

        target.named(name)  # which refuses what this CPU cannot run
        target.host = lambda: target.targets()[name]


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test that is marked `few(n)`, all cases but n are slow: see `spread`."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in tests.values():
        (count,) = cases[0].get_closest_marker("few").args
        for place in set(range(len(cases))) - spread(len(cases), count):
            cases[place].add_marker(pytest.mark.slow)


class Jitter(TorchFunctionMode):
    """Scales the results of products and norms by 1 and a few units in the last place.

    Two CPUs, and two alignments of one weight in memory, give such differences. A test that asserts
    bit equality of floats that torch computes twice passes by luck: it fails under this mode.
    """

    _WIDE = (torch.float32, torch.float64)
    _DISTURBED = frozenset(
        {
            torch.nn.functional.linear,
            torch.nn.functional.scaled_dot_product_attention,
            torch.nn.functional.layer_norm,
            torch.addmm,
            torch.baddbmm,
            torch.bmm,
            torch.matmul,
            torch.mm,
            torch.Tensor.matmul,
            torch.Tensor.__matmul__,
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self._random = random.Random(0)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._DISTURBED and "out" not in (kwargs or {}) and result.dtype in self._WIDE:
            return result * (
                1 + self._random.choice([-4, -2, 2, 4]) * torch.finfo(result.dtype).eps
            )
        return result


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Test workers share two cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _gradients_are_on() -> None:
    """Once in a while something before a test leaves them switched off: the warning names the test."""
    if not torch.is_grad_enabled():
        warnings.warn("gradients were switched off before this test", stacklevel=1)
        torch.set_grad_enabled(True)


@pytest.fixture(autouse=True)
def _other_machine(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--jitter"):
        yield
        return
    with Jitter():
        yield


@pytest.fixture(autouse=True)
def _arm_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """What goes wrong in the emulated process is known to the test alone."""
    yield
    if request.config.getoption("--arm"):
        from tests.support import arm

        found, arm.failures[:] = arm.failures[:3], []
        assert not found, found


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--arm"):
        from tests.support import arm

        counts = ", ".join(f"{count} {name}" for name, count in arm.counted.items())
        terminalreporter.write_line(f"ARM kernels under qemu, compared with x86 code: {counts}")
