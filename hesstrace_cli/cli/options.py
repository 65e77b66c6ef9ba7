"""Typer's options, made from the fields of a config's dataclass: declared once, in config.py."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any, cast, get_type_hints

import typer

from hesstrace_cli.config import DataConfig, key_of
from hesstrace_cli.distributed import launcher


def with_options(config_class: type[DataConfig]) -> Callable[[Callable[..., None]], Any]:
    """Give a command all options of a config; it gets those that were given as `flags`.

    Args:
        config_class: Its fields become options; `--config FILE` is added.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p for p in inspect.signature(command, eval_str=True).parameters.values()
            if p.name not in ("flags", "config")
        ]  # fmt: skip
        hints = get_type_hints(config_class)
        options = [_config_file(), *(_option(f, hints) for f in dataclasses.fields(config_class))]
        names = [p.name for p in options[1:]]

        def called(**values: Any) -> None:
            launcher.place()  # every command speaks as one of a job's processes, or alone
            flags = {name: values.pop(name) for name in names}
            flags = {name: value for name, value in flags.items() if value not in (None, [], ())}
            command(flags=flags, **values)

        call: Any = called  # a signature of its own is what Typer reads
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *options]]
        call.__signature__ = inspect.Signature(parameters)
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return cast(Callable[..., None], call)

    return decorate


def _config_file() -> inspect.Parameter:
    info = typer.Option("--config", help="YAML file with the same names; flags win over it")
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[str | None, info],
    )  # fmt: skip


def _option(item: dataclasses.Field[Any], hints: dict[str, Any]) -> inspect.Parameter:
    meta, flag, kind = item.metadata, "--" + key_of(item.name), str(hints[item.name])
    default = item.default_factory() if callable(item.default_factory) else item.default
    is_bool = kind.startswith("bool") or hints[item.name] is bool
    repeated = kind.startswith(("list[str", "dict"))
    info = typer.Option(
        f"{flag}/--no-{key_of(item.name)}" if is_bool else flag,
        help=meta["help"] if default is None else re.sub(r" \(default: .*\)$", "", meta["help"]),
        rich_help_panel=meta["panel"],
        metavar=None if is_bool else meta["metavar"] or "|".join(meta["choices"]) or _metavar(kind),
        show_default=_shown(default, flag if repeated else None),
    )
    annotation: Any = list[str] if repeated else (bool if is_bool else str)
    return inspect.Parameter(
        item.name, inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[annotation | None, info],
    )  # fmt: skip


def _metavar(kind: str) -> str:
    if "list" in kind:
        return "N,N,..."
    return "INTEGER" if "int" in kind else "NUMBER" if "float" in kind else "TEXT"


def _shown(default: Any, repeated: str | None) -> str | bool:
    """The default as it is typed; `repeated` is the flag that stands before each of several."""
    if default is None or isinstance(default, bool) or default in ([], {}):
        return False
    if not isinstance(default, list):
        return str(default)
    if repeated and len(default) > 1:
        return " ".join(f"{repeated} {value}" for value in default)
    return ",".join(map(str, default))
