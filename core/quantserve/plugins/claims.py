"""Who a name belongs to when several plugins claim it, so that a newcomer never takes down what was there.

1. What the plugins of this project claim, name or alias, is theirs.
2. A name beats an alias: the alias is dropped, and its plugin stays.
3. Of several plugins with one method name, the one whose distribution is ``quantserve-NAME`` keeps it, else the one
   whose entry point is NAME. Where neither distinguishes one of them, none serves it, and all are named.
4. An alias of several plugins belongs to none of them; the plugins stay.

A suffix of files (``.gguf``) that several plugins read belongs to the one whose distribution is ``quantserve-SUFFIX``,
else to none; the plugins stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from quantserve.plugins.entry_points import named_for
from quantserve.plugins.plugin import Failure, Plugin

OURS: Final = (
    "fp16",
    "awq",
    "squeezellm",
    "gptq",
    "fp8",
    "vllm",
    "hqq",
    "mxfp4",
    "modelopt",
    "bitsandbytes",
    "gguf",
    "compressed-tensors",
)
"""Methods that have a plugin in this project, in a distribution ``quantserve-NAME``."""


@dataclass(frozen=True)
class Settled:
    """The plugins, each with the names that are its own.

    Attributes:
        plugins: those that stay.
        failures: those that lost their method's name.
        contested: aliases and suffixes that belong to nobody, with the reason.
    """

    plugins: tuple[Plugin, ...]
    failures: tuple[Failure, ...]
    contested: Mapping[str, str]


def is_ours(plugin: Plugin) -> bool:
    """Whether the plugin is one of this project's methods."""
    return bool(plugin.method) and plugin.method.name in OURS and named_for(plugin.distribution, plugin.method.name)  # type: ignore[union-attr]


def settle(plugins: Iterable[Plugin]) -> Settled:
    """Give every method name and alias to one plugin at most."""
    everyone = list(plugins)
    ours = {name: plugin for plugin in everyone if is_ours(plugin) and plugin.method for name in plugin.method.names}
    others = [plugin for plugin in everyone if plugin.method and not is_ours(plugin)]
    lost = _lost_names(ours, others)
    kept = [plugin for plugin in others if plugin.name not in lost]

    names = {**ours, **{plugin.method.name: plugin for plugin in others if plugin.method}}
    claimants = defaultdict(list)
    for plugin in kept:
        for alias in plugin.method.aliases if plugin.method else ():
            if alias not in names:
                claimants[alias].append(plugin)
    contested = {
        alias: f"{alias!r} is an alias of {' and of '.join(p.label for p in claiming)}, and belongs to none of them"
        for alias, claiming in claimants.items()
        if len(claiming) > 1
    }
    settled = {plugin.name: _with_own_aliases(plugin, names, contested) for plugin in kept}
    stay = [settled.get(plugin.name, plugin) for plugin in everyone if plugin.name not in lost]
    suffixes = _owners_of_suffixes(stay)
    return Settled(
        plugins=tuple(_with_own_suffixes(plugin, suffixes) for plugin in stay),
        failures=tuple(lost.values()),
        contested=contested | {suffix: owner for suffix, owner in suffixes.items() if isinstance(owner, str)},
    )


def _lost_names(ours: Mapping[str, Plugin], others: Sequence[Plugin]) -> dict[str, Failure]:
    """The plugins that lose their method's name, by entry point."""
    lost: dict[str, Failure] = {}
    rivals = defaultdict(list)
    for plugin in others:
        assert plugin.method is not None
        name = plugin.method.name
        if owner := ours.get(name):
            kind = "name" if owner.method and owner.method.name == name else "alias"
            reason = f"method name {name!r} is the {kind} of {owner.label}, which keeps it"
            lost[plugin.name] = _failure(plugin, reason, f"uninstall {plugin.distribution}, or {_disable(plugin)}")
        else:
            rivals[name].append(plugin)
    for name, claiming in rivals.items():
        if len(claiming) < 2:
            continue
        ranks = [2 * named_for(p.distribution, name) + (p.name == name) for p in claiming]
        first = claiming[ranks.index(max(ranks))] if ranks.count(max(ranks)) == 1 else None
        who = " and ".join(plugin.label for plugin in claiming)
        either = " or ".join(plugin.distribution for plugin in claiming)
        for plugin in claiming:
            if first is None:
                reason = f"method name {name!r} is claimed by {who}; neither is used"
                fix = f"uninstall {either}, or {' or '.join(map(_disable, claiming))}"
                lost[plugin.name] = _failure(plugin, reason, fix)
            elif plugin is not first:
                reason = f"method name {name!r} is claimed by {who}; it belongs to {first.label}"
                lost[plugin.name] = _failure(plugin, reason, f"uninstall {plugin.distribution}, or {_disable(plugin)}")
    return lost


def _with_own_aliases(plugin: Plugin, names: Mapping[str, Plugin], contested: Mapping[str, str]) -> Plugin:
    method = plugin.method
    assert method is not None
    notes = list(plugin.notes)
    for alias in method.aliases:
        if alias in names:
            notes.append(f"alias {alias!r} of {plugin.label} is dropped: it belongs to {names[alias].label}")
        elif alias in contested:
            notes.append(f"alias {alias!r} of {plugin.label} is dropped: {contested[alias]}")
    aliases = tuple(alias for alias in method.aliases if alias not in names and alias not in contested)
    return replace(plugin, method=replace(method, aliases=aliases), notes=tuple(notes))


def _owners_of_suffixes(plugins: Iterable[Plugin]) -> dict[str, Plugin | str]:
    """Who reads the files of each suffix; the reason where nobody does."""
    claimants = defaultdict(list)
    for plugin in plugins:
        for suffix in plugin.reader.suffixes if plugin.reader else ():
            claimants[suffix].append(plugin)
    owners: dict[str, Plugin | str] = {}
    for suffix, claiming in claimants.items():
        named = [plugin for plugin in claiming if named_for(plugin.distribution, suffix[1:])]
        who = " and ".join(plugin.label for plugin in claiming)
        only = claiming if len(claiming) == 1 else named
        owners[suffix] = only[0] if len(only) == 1 else f"*{suffix} files are claimed by {who}; neither reads them"
    return owners


def _with_own_suffixes(plugin: Plugin, owners: Mapping[str, Plugin | str]) -> Plugin:
    """The plugin without the suffixes that are another's or nobody's."""
    if plugin.reader is None:
        return plugin
    lost = [suffix for suffix in plugin.reader.suffixes if owners[suffix] is not plugin]
    notes = []
    for suffix in lost:
        owner = owners[suffix]
        why = owner if isinstance(owner, str) else f"they belong to {owner.label}"
        notes.append(f"{plugin.label} does not read *{suffix} files: {why}")
    own = tuple(suffix for suffix in plugin.reader.suffixes if suffix not in lost)
    return replace(plugin, reader=replace(plugin.reader, suffixes=own), notes=(*plugin.notes, *notes))


def _failure(plugin: Plugin, reason: str, fix: str) -> Failure:
    claims = plugin.method.names if plugin.method else ()
    return Failure(plugin.name, plugin.distribution, plugin.version, "names", reason, claims, fix)


def _disable(plugin: Plugin) -> str:
    return f"QUANTSERVE_DISABLE={plugin.name}"
