"""Modules that are executed when they are first used, and not when a library imports them.

Lightning and torchmetrics import, at every start, what most trainings never call: ``torch._dynamo`` for the class of
compiled modules, matplotlib for ``metric.plot()``, parts of SciPy that ASE and torchmetrics touch. That takes more than
half of the time between a command and its first step. :func:`defer` puts a finder before Python's own, as
:class:`importlib.util.LazyLoader` is meant for, with two differences: names that are taken out of a module when it is
imported have stand-ins (:class:`Deferred`), and a submodule executes its parent first, as ever.

A stand-in of a class is no class of any object as long as its module was not executed, since nothing can have made an
object of it; calling one, or reading anything else of the module, executes it.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

__all__ = ["DEFERRED", "Deferred", "defer", "is_deferred"]


@dataclass(frozen=True)
class Deferred:
    """Names of a module that others take when they import it.

    Args:
        classes: for annotations and ``isinstance``.
        functions: executed with the module when they are called. With dots, a function of a submodule, which the module
            has under its last name only because another library puts it there.
        idle: functions that do nothing without their module, and what takes their place until then.
    """

    classes: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()
    idle: Mapping[str, Callable[[ModuleType], Any]] = field(default_factory=dict)

    def stand_in(self, module: ModuleType, name: str) -> Any:
        """Stand-in of a name of the module; None if it has none."""
        if name in self.classes:
            return _DeferredClass(name, (), {"__module__": module.__name__, "_module": module})
        if name in self.idle:
            return self.idle[name](module)
        path = next((path for path in self.functions if path.rpartition(".")[2] == name), None)
        return None if path is None else _call(module, path)


def _undecorated(module: ModuleType) -> Callable[..., Any]:
    """``torch._dynamo.disable``: a function that is not to be compiled, which nothing is before dynamo is loaded."""

    def disable(function: Callable[..., Any], recursive: bool = True, **options: Any) -> Callable[..., Any]:
        disabled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            if is_deferred(module):
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(module.disable(function, recursive, **options))
            return disabled[0](*args, **kwargs)

        return called

    return disable


def _nothing(name: str) -> Callable[[ModuleType], Callable[..., Any]]:
    """A function that returns None until its module is loaded, such as ``torch._dynamo.graph_break``."""

    def of(module: ModuleType) -> Callable[..., Any]:
        return lambda *args, **kwargs: None if is_deferred(module) else getattr(module, name)(*args, **kwargs)

    return of


DEFERRED: dict[str, Deferred] = {
    # PyTorch Geometric brings all of them, whatever is asked of it
    "torch_geometric.datasets": Deferred(),
    # Lightning asks whether a module is compiled; torch's optimizers keep their methods from being compiled
    "torch._dynamo": Deferred(
        classes=("OptimizedModule",), idle={"disable": _undecorated, "graph_break": _nothing("graph_break")}
    ),
    # torchmetrics gives it a name that SciPy has moved
    "scipy.signal": Deferred(functions=("windows.hamming",)),
    # ASE's readers know space groups, these know Brillouin zones; its EMT has neighbour lists
    "scipy.integrate": Deferred(functions=("trapezoid",)),
    "scipy.spatial": Deferred(classes=("cKDTree",)),
    "torchmetrics.utilities.plot": Deferred(
        classes=("_AX_TYPE", "_CMAP_TYPE", "_PLOT_OUT_TYPE"),
        functions=("plot_confusion_matrix", "plot_curve", "plot_single_or_multi_val"),
    ),
}
"""Modules that :func:`defer` defers, with the names that are taken when they are imported."""


class _DeferredModule(ModuleType):
    """A module that has its place and no content yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by whoever goes through all modules
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        found = DEFERRED[self.__name__].stand_in(self, name)
        if found is None:
            return getattr(_executed(self), name)
        self.__dict__[name] = found  # the same at every question
        return found


class _DeferredClass(type):
    """Class of a stand-in for a class."""

    _module: ModuleType

    def _real(cls) -> Any:
        return getattr(_executed(cls._module), cls.__name__)

    def __instancecheck__(cls, instance: object) -> bool:
        return not is_deferred(cls._module) and isinstance(instance, cls._real())

    def __subclasscheck__(cls, subclass: type) -> bool:
        return subclass is cls or (not is_deferred(cls._module) and issubclass(subclass, cls._real()))

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls._real()(*args, **kwargs)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._real(), name)


def _call(module: ModuleType, path: str) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return _at(_executed(module), path)(*args, **kwargs)

    called.__name__ = called.__qualname__ = path.rpartition(".")[2]
    return called


def _at(module: ModuleType, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), module)


def is_deferred(module: ModuleType | None) -> bool:
    """True as long as a module was imported but not executed."""
    return type(module) is _DeferredModule


def _executed(module: ModuleType) -> ModuleType:
    """The module with its content."""
    with _LOCK:
        if is_deferred(module):
            spec = module.__spec__
            if spec is None or not isinstance(spec.loader, _DeferringLoader):
                raise ImportError(f"{module.__name__} has lost the loader that it was found with.")
            deferred, loader = DEFERRED[module.__name__], spec.loader.loader
            for name in [*deferred.classes, *deferred.idle, *(path.rpartition(".")[2] for path in deferred.functions)]:
                module.__dict__.pop(name, None)
            module.__class__ = ModuleType
            spec.loader = module.__loader__ = loader
            loader.exec_module(module)
            for path in deferred.functions:  # what another library would have put there
                if "." in path and not hasattr(module, path.rpartition(".")[2]):
                    setattr(module, path.rpartition(".")[2], _at(module, path))
        return module


_LOCK = threading.RLock()


class _DeferringLoader(Loader):
    """Leaves a module without its content."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = _DeferredModule


class _ExistingLoader(Loader):
    """Gives back a module that its parent has imported meanwhile."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Finder(MetaPathFinder):
    """Finds the modules of :data:`DEFERRED`, and executes one before a module within it is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        parent = sys.modules.get(fullname.rpartition(".")[0])
        if parent is not None and is_deferred(parent):
            _executed(parent)
            if fullname in sys.modules:
                return importlib.machinery.ModuleSpec(fullname, _ExistingLoader(sys.modules[fullname]))
        if fullname not in DEFERRED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeferringLoader(spec.loader)
        return spec


def defer() -> None:
    """Defer the modules of :data:`DEFERRED` in this process; those that it has imported already stay as they are.

    For commands of this package, whose process belongs to them. ``import harness`` in a program of your own leaves
    Python's imports alone.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
