"""A recipe in other systems' names, in whole or in part, becomes one in ours, with a line for every step of the way.

Every setting has a level: a peer's default (0), the file (1), the command line (2). The higher one wins; two different
values of one setting on one level are an error, whether they are written in our names or in others'.
Left out: validation of our own names and values, which follows in `config.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from opdkit.aliases import given
from opdkit.aliases.joint import JOINT
from opdkit.aliases.rules import fitting, unread
from opdkit.aliases.table import Meaning, Peer, Rule, chosen_peer, is_joint, look_up
from opdkit.aliases.values import MISSING, SINGLE, WrongValue
from opdkit.errors import RecipeError

DEFAULT, FILE, COMMAND = 0, 1, 2


@dataclass(frozen=True)
class Translation:
    """A recipe in our names: its mapping, the command line's dotted settings that go on top, and what was done."""

    data: dict[str, Any]
    pairs: Mapping[str, Any]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Setting:
    key: str
    value: Any
    level: int
    source: str  # as the user wrote it
    meaning: Meaning | None = None


@dataclass
class _Work:
    """What is known while one recipe is translated."""

    peer: Peer | None
    own: Mapping[str, Any]  # the file in our names
    own_pairs: Mapping[str, Any]  # the command line in our names, dotted
    names: dict[str, tuple[Any, int]]  # their name in its first spelling -> (value, level)
    written: Mapping[str, str]  # first spelling -> as the user spelt it
    notes: list[str] = field(default_factory=list)

    def read(self, key: str) -> Any:
        """A setting that the recipe gives in our names; None where it does not."""
        found = self.own_pairs.get(key, given.at(self.own, key))
        return None if found is MISSING else found


def translate(data: Mapping[str, Any], pairs: Mapping[str, Any] | None = None) -> Translation:
    """Translate a recipe's mapping and the command line's dotted settings (`pairs`, in anyone's names).

    Raises RecipeError for a name that means several things and no `peer`, a name that the peer does not use, a value
    that the name cannot have, a setting that cannot be had here, and settings that contradict each other.
    """
    pairs = dict(pairs or {})
    wanted = pairs.pop("peer", data.get("peer"))
    peer = chosen_peer(wanted) if wanted is not None else None
    name = peer.name if peer else None
    own, theirs = given.split({k: v for k, v in data.items() if k != "peer"}, name)
    own_pairs, their_pairs = given.split_pairs(pairs, name)
    if peer is None and not theirs and not their_pairs:
        return Translation(own, own_pairs)
    written: dict[str, str] = {}
    names = _spelt(theirs, FILE, name, written) | _spelt(their_pairs, COMMAND, name, written)
    defaults = {n: (v, DEFAULT) for n, v in (peer.defaults if peer else {}).items() if n not in names}
    work = _Work(peer, own, own_pairs, names | defaults, written)
    settings = list(_settings(work))
    settings = _chosen_method(work, settings)
    kept = _resolve(work, settings)
    for setting in kept:
        given.put(own, setting.key, setting.value)
    return Translation(own, own_pairs, tuple(_lines(work, kept)))


def _spelt(
    found: Mapping[str, Any], level: int, peer: str | None, written: dict[str, str]
) -> dict[str, tuple[Any, int]]:
    """Names in their first spelling; `written` learns how they were spelt.

    Raises RecipeError for two spellings with different values.
    """
    names: dict[str, tuple[Any, int]] = {}
    for name, value in found.items():
        meaning = _meaning(name, value, peer)
        first = meaning.names[0] if name in meaning.also else name
        if first in names and names[first][0] != value:
            raise RecipeError(f"'{name}: {given.show(value)}' and '{written[first]}: {given.show(names[first][0])}' are two "
                              "spellings of one setting: give one of them")  # fmt: skip
        names[first], written[first] = (value, level), name
    return names


def _meaning(name: str, value: Any, peer: str | None) -> Meaning:
    """The one meaning of a name. Raises RecipeError when there are several, or none for this peer."""
    found = look_up(name, peer)
    if len(found) == 1:
        return found[0]
    if peer is not None:
        others = sorted({p for m in look_up(name, None) for p in m.of})
        raise RecipeError(
            f"'{name}' is not a name of {peer}; {', '.join(others)} use it. Change `peer` or drop the name"
        )
    said = "; ".join(f"{', '.join(m.of)}: {m.says}" for m in found)
    raise RecipeError(f"'{name}: {given.show(value)}' means different things: {said}. Say whose name it is with `peer: NAME` "
                      "at the top of the recipe, or write our own setting")  # fmt: skip


def _settings(work: _Work) -> Iterator[_Setting]:
    """What every name becomes, at its level."""
    peer = work.peer.name if work.peer else None
    done: set[Meaning] = set()
    for name, (value, level) in work.names.items():
        meaning = _meaning(name, value, peer)
        shown = f"{work.written.get(name, name)}: {given.show(value)}"
        if meaning.refuse:
            if value not in meaning.harmless:
                raise RecipeError(f"'{shown}': {meaning.refuse}")
        elif meaning.ignore:
            if level > DEFAULT:
                work.notes.append(f"ignored: {shown} ({meaning.ignore})")
        elif meaning.to == ("rule",):
            if peer is None:
                raise RecipeError(f"'{shown}' chooses a method: say whose name it is with `peer: {meaning.of[0]}`")
        elif is_joint(meaning):
            if meaning not in done:
                done.add(meaning)
                yield from _joint(work, meaning)
        elif value is not None:  # null is "left out" everywhere
            try:
                found = meaning.choices[value] if meaning.choices is not None else SINGLE[meaning.how](value)
            except (KeyError, TypeError):
                assert meaning.choices is not None
                raise RecipeError(
                    f"'{shown}': expected {', '.join(map(given.show, meaning.choices))} ({meaning.says})"
                ) from None
            except WrongValue as wrong:
                raise RecipeError(f"'{shown}': {wrong} ({meaning.says})") from None
            yield from _spread(meaning, found, level, shown)
        if meaning.differs and level > DEFAULT and value not in meaning.harmless:
            work.notes.append(f"note: {work.written.get(name, name)}: {meaning.differs}")


def _joint(work: _Work, meaning: Meaning) -> Iterator[_Setting]:
    """The settings that several names make together; their level is the highest among the names."""
    used = {n: work.names[n] for n in meaning.names if n in work.names}
    shown = {n: v for n, (v, level) in used.items() if level > DEFAULT} or {n: v for n, (v, _) in used.items()}
    source = ", ".join(f"{work.written.get(n, n)}: {given.show(v)}" for n, v in shown.items())
    values = {n: work.names[n][0] for n in (*meaning.names, *meaning.reads) if n in work.names}
    values = {n: v for n, v in values.items() if v is not None}  # null is "left out" everywhere
    if not values.keys() & {*meaning.names}:
        return
    level = max(level for _, level in used.values())
    try:
        found = JOINT[meaning.how](values, work.read)
    except WrongValue as wrong:
        if level == DEFAULT and work.peer is not None:  # nothing was asked for, so ours stands, and is said
            if all(work.read(key) is None for key in meaning.to):
                work.notes.append(f"note: {work.peer.name}'s default {source} is not taken ({wrong}): ours stands for "
                                  + ", ".join(meaning.to))  # fmt: skip
            return
        raise RecipeError(f"'{source}': {wrong} ({meaning.says})") from None
    yield from _spread(meaning, found, level, source)


def _spread(meaning: Meaning, found: Any, level: int, source: str) -> Iterator[_Setting]:
    """One value for one or several keys, a tuple with one value a key, or a mapping of a section's keys."""
    if found is MISSING:
        return
    if meaning.to[0].endswith(".*"):
        yield from (_Setting(f"{meaning.to[0][:-1]}{k}", v, level, source, meaning) for k, v in found.items())
        return
    values = found if isinstance(found, tuple) else (found,) * len(meaning.to)
    for key, value in zip(meaning.to, values, strict=True):
        yield _Setting(key, value, level, source, meaning)


def _chosen_method(work: _Work, settings: list[_Setting]) -> list[_Setting]:
    """Settings with the method that the peer's rules choose; a recipe that names its method keeps it."""
    if work.peer is None or not work.peer.rules or work.read("method.name") is not None:
        return settings
    rule = fitting(work.peer, {name: value for name, (value, _) in work.names.items()})
    source = f"peer: {work.peer.name}"
    if rule.refuse:
        raise RecipeError(f"{source}: {rule.refuse}")
    kept = [s for s in settings if not s.key.startswith("method.") or _passed(rule, s)]
    for dropped in (s for s in settings if s not in kept):
        if unread(work.peer, dropped.meaning, work.names, FILE):
            raise RecipeError(f"'{dropped.source}' has no effect on {rule.method} ({rule.means}), which {source} and the "
                              "other names of this recipe choose; drop it")  # fmt: skip
    chosen = [_Setting("method.name", rule.method, FILE, source, Meaning((), (), means=rule.means))]
    chosen += [_Setting(key, value, FILE, source) for key, value in rule.settings.items()]
    if rule.differs:
        work.notes.append(f"note: {rule.differs}")
    return chosen + kept


def _passed(rule: Rule, setting: _Setting) -> bool:
    return setting.meaning is not None and bool({*setting.meaning.names} & {*rule.passed})


def _resolve(work: _Work, settings: list[_Setting]) -> list[_Setting]:
    """The settings that hold: the highest level wins, equals agree, different values on one level are an error."""
    best: dict[str, _Setting] = {}
    for setting in settings:
        written = given.at(work.own, setting.key)
        paired = work.own_pairs.get(setting.key, MISSING)
        for level, ours in ((FILE, written), (COMMAND, paired)):
            if ours is not MISSING and setting.level == level and ours != setting.value:
                raise RecipeError(f"'{setting.source}' means {setting.key}: {given.show(setting.value)}, but the recipe also "
                                  f"says {setting.key}: {given.show(ours)}; give one of them")  # fmt: skip
        if (written is not MISSING and setting.level < COMMAND) or paired is not MISSING:
            continue
        if setting.level == DEFAULT and given.show(setting.value) == given.show(given.own_default(setting.key)):
            continue
        other = best.get(setting.key)
        if other is not None and other.level == setting.level and other.value != setting.value:
            raise RecipeError(f"'{other.source}' means {setting.key}: {given.show(other.value)}, but '{setting.source}' means "
                              f"{given.show(setting.value)}; give one of them")  # fmt: skip
        if other is None or other.level < setting.level:
            best[setting.key] = setting
    return list(best.values())


def _lines(work: _Work, kept: list[_Setting]) -> Iterator[str]:
    """What is printed: what the user wrote first, then what the peer's defaults add, then notes."""
    lines: dict[tuple[bool, str], list[_Setting]] = {}
    for setting in kept:
        lines.setdefault((setting.level == DEFAULT, setting.source), []).append(setting)
    if work.peer is not None:
        yield f"peer: {work.peer.name} ({work.peer.title})"
    for (default, source), made in sorted(lines.items(), key=lambda entry: entry[0][0]):
        left_out = f"left out, {work.peer.name}'s default: " if default and work.peer is not None else ""
        became = ", ".join(f"{s.key}: {given.show(s.value)}" for s in made)
        means = f" ({made[0].meaning.means})" if made[0].meaning is not None else ""
        yield f"{left_out}{source} -> {became}{means}"
    yield from dict.fromkeys(work.notes)
