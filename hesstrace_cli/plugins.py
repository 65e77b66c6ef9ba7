"""Import of users' factories, named `FILE.py:factory` or `package.module:factory`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hesstrace_cli.errors import HesstraceError


def is_factory(spec: str) -> bool:
    """Whether `spec` has the form of a factory, rather than of a built-in name."""
    return ":" in spec


def load_factory(spec: str, error: type[HesstraceError]) -> Callable[..., Any]:
    """Import the factory that `spec` names.

    Args:
        spec: `FILE.py:factory` or `package.module:factory`.
        error: The class of the error to raise.

    Raises:
        HesstraceError: Of class `error`, if the file, module or name is not there. What the
            imported code itself raises goes through, with its traceback.
    """
    where, _, name = spec.rpartition(":")
    if not where or (where.startswith(".") and not where.endswith(".py")):
        raise error(f"{spec!r} is no factory, expected FILE.py:factory or package.module:factory")
    module = _import_file(Path(where), error) if where.endswith(".py") else _import(where, error)
    factory: Callable[..., Any] | None = getattr(module, name, None)
    if factory is None or not callable(factory):
        public = ", ".join(n for n in vars(module) if not n.startswith("_")) or "none"
        raise error(f"{spec!r}: {where} has no function {name!r}; its names: {public}")
    return factory


def _import_file(path: Path, error: type[HesstraceError]) -> ModuleType:
    if not path.is_file():
        raise error(f"plug-in file {str(path)!r} does not exist")
    digest = hashlib.sha1(str(path.resolve()).encode()).hexdigest()[:8]
    module_name = f"hesstrace_plugin_{path.stem}_{digest}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _import(name: str, error: type[HesstraceError]) -> ModuleType:
    # A console script does not have the current folder on its path, as `python -m` has.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if problem.name is not None and (name == problem.name or name.startswith(problem.name)):
            raise error(f"there is no module {name!r} to import a factory from") from problem
        raise


def accepted(factory: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the `offered` keyword arguments that the factory takes by name."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return {}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(offered)
    names = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    return {name: value for name, value in offered.items() if name in names}


def call_factory(
    factory: Callable[..., Any],
    arguments: Mapping[str, Any],
    spec: str,
    error: type[HesstraceError],
) -> Any:
    """What the factory makes; what its own code raises goes through, with its traceback.

    Raises:
        HesstraceError: Of class `error`, if the factory cannot be called with these arguments.
    """
    try:
        inspect.signature(factory).bind(**arguments)
    except ValueError:  # a callable without a signature
        pass
    except TypeError as problem:
        given = ", ".join(arguments) or "no arguments"
        raise error(f"{spec!r} cannot be called with {given}: {problem}") from problem
    return factory(**arguments)
