"""Import of users' factories, named `FILE.py:factory` or `package.module:factory`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from hesstrace_cli.errors import HesstraceError
from hesstrace_cli.hints import did_you_mean
from hesstrace_cli.paths import is_file, resolved

_NAMED = 20  # names of a module, in an error


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
    with _users_code(spec, error):
        module = (
            _import_file(Path(where), error) if where.endswith(".py") else _import(where, error)
        )
        factory: Callable[..., Any] | None = getattr(module, name, None)
    if factory is None or not callable(factory):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise error(
            f"{spec!r}: {where} has no function {name!r}{did_you_mean(name, public)} Its names: "
            f"{', '.join(public[:_NAMED]) or 'none'}{', ...' if len(public) > _NAMED else ''}"
        )
    return factory


@contextmanager
def _users_code(spec: str, error: type[HesstraceError]) -> Iterator[None]:
    """Where code of the user's runs that must not end the program, nor switch gradients off.

    Raises:
        HesstraceError: Of class `error`, if it calls `sys.exit`.
    """
    import torch

    try:
        with torch.enable_grad():
            yield
    except SystemExit as problem:
        raise error(f"{spec!r} ended the program, by sys.exit({problem.code!r})") from problem


def _import_file(path: Path, error: type[HesstraceError]) -> ModuleType:
    if not is_file(path):
        raise error(f"plug-in file {str(path)!r} does not exist")
    digest = hashlib.sha1(os.fsencode(resolved(path))).hexdigest()[:8]
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
    with suppress(FileNotFoundError):  # it has been deleted
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
    *positional: Any,
) -> Any:
    """What the factory makes; what its own code raises goes through, with its traceback.

    Args:
        factory: As `load_factory` gives it.
        arguments: By name.
        spec: What to call it in an error.
        error: The class of the error to raise.
        positional: Arguments before those.

    Raises:
        HesstraceError: Of class `error`, if the factory cannot be called with these arguments.
    """
    with _users_code(spec, error):
        try:
            made = factory(*positional, **arguments)
        except TypeError as problem:
            if _is_from_within(problem):
                raise
            given = ", ".join(arguments) or f"{len(positional) or 'no'} arguments"
            raise error(f"{spec!r} cannot be called with {given}: {problem}") from problem
    if inspect.iscoroutine(made):
        made.close()
        raise error(f"{spec!r} is asynchronous, expected a plain function")
    return made


def _is_from_within(problem: TypeError) -> bool:
    """Whether the called code raised it, not the call that gave it arguments it does not take."""
    trace = problem.__traceback__
    return trace is not None and trace.tb_next is not None
