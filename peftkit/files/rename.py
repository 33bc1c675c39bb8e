"""Other names for the modules of an adapter file, where a file and a model spell them differently.

A rule is a pattern and what takes its place, {"blocks.*.self_attn.q": "blocks.*.attn1.to_q"}. Patterns are those of
`ignore` and of strengths: they match a whole name, `*` is any run of characters, `?` one, `[ab]` one of some. The
replacement has as many of them, and each stands for what the one at its place in the pattern has matched. The first
rule that matches a name counts. The names are those that `pk.inspect` lists: of modules, and of parameters that trained
beside them.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import zip_longest
from typing import TypeVar

from peftkit.errors import OptionError, did_you_mean, require_option
from peftkit.files.formats.patch import AdapterFile, Patch

T = TypeVar("T")

#: longer names are compared with no others, which takes the square of their length
_LONGEST = 300
_WILDCARD = re.compile(r"(\*+|\?|\[!?\]?[^\]]*\])")


class Renames:
    """Rules of other names, and which of them have matched one.

    Example:
        >>> from peftkit.files.rename import Renames
        >>> renames = Renames({"transformer.*": "*", "blocks.*.q": "blocks.*.to_q"})
        >>> renames.of("transformer.blocks.0.q"), renames.of("norm")
        ('blocks.0.q', 'norm')
        >>> renames.unmatched
        ['blocks.*.q']
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        rules = isinstance(given, Mapping) and all(isinstance(end, str) for rule in given.items() for end in rule)
        require_option(rules, "rename", given, "{pattern: replacement}")
        self._rules = {pattern: _Rule(pattern, replacement) for pattern, replacement in given.items()}
        self._left = dict.fromkeys(given)

    def __bool__(self) -> bool:
        return bool(self._rules)

    def of(self, name: str) -> str:
        """The name by the first rule that matches, the same one without any."""
        for pattern, rule in self._rules.items():
            found = rule.of(name)
            if found is not None:
                self._left.pop(pattern, None)
                return found
        return name

    def of_parameter(self, name: str) -> str:
        """The name of a parameter by the first rule that matches it, else by the first that matches its module."""
        own, (module, _, last) = self.of(name), name.rpartition(".")
        return own if own != name else f"{self.of(module)}.{last}".lstrip(".")

    @property
    def unmatched(self) -> list[str]:
        """The patterns that have been first for no name so far."""
        return list(self._left)

    def require_matched(self, names: Iterable[str], files: str) -> None:
        """Raise OptionError for a pattern that has been first for none of the names of some files."""
        if not self._left:
            return
        pattern, names = next(iter(self._left)), list(names)
        rule, what = self._rules[pattern], f"{pattern!r} of rename matches no name of {files}"
        if any(rule.of(name) is not None for name in names):
            raise OptionError(f"{what} that the rules before it leave: give it before them")
        why = did_you_mean(pattern, names)
        if any(name.startswith(pattern) for name in names):
            why = f": a pattern matches whole names, give {said(pattern + '*', rule.replacement + '*')}"
        raise OptionError(f"{what}{why if why.startswith(':') else '.' + why}".removesuffix("."))


class _Rule:
    """One pattern and what takes its place."""

    def __init__(self, pattern: str, replacement: str) -> None:
        self.pattern, self.replacement = pattern, replacement
        literals, wildcards = _parts(pattern)
        self._literals, places = _parts(replacement)
        require_option(
            len(wildcards) == len(places),
            "rename",
            {pattern: replacement},
            f"{len(wildcards)} * in the replacement, as in the pattern,",
            " Each stands for what the one at its place has matched",
        )
        groups = (f"({_group(wildcard)})" for wildcard in wildcards)
        expression = "".join(re.escape(text) + group for text, group in zip_longest(literals, groups, fillvalue=""))
        try:
            self._match = re.compile(expression, re.DOTALL).fullmatch
        except re.error as error:
            raise OptionError(f"{pattern!r} of rename is no pattern: {error}") from error

    def of(self, name: str) -> str | None:
        # fnmatch says no in a time that grows with the name alone; after its yes the search never goes back
        found = self._match(name) if fnmatch.fnmatchcase(name, self.pattern) else None
        if found is None:
            return None
        return "".join(text + piece for text, piece in zip_longest(self._literals, found.groups(), fillvalue=""))


def _parts(pattern: str) -> tuple[list[str], list[str]]:
    """What stands between the wildcards of a pattern, and these."""
    pieces = _WILDCARD.split(pattern)
    return pieces[::2], pieces[1::2]


def _group(wildcard: str) -> str:
    """A wildcard as a regular expression; a run of characters is as short as it can be."""
    if wildcard[0] != "[":
        return "." if wildcard == "?" else ".*?"
    negated, letters = wildcard[1] == "!", wildcard[1:-1].removeprefix("!")
    return f"[{'^' if negated else ''}{re.escape(letters)}]".replace(r"\-", "-")


def said(pattern: str, replacement: str) -> str:
    """Return a rule as an option is written, for a message.

    Example:
        >>> from peftkit.files.rename import said
        >>> said("net.*", "*")
        "rename={'net.*': '*'}"
    """
    return f"rename={{{pattern!r}: {replacement!r}}}"


def suggested(name: str, meant: str) -> str:
    """Return the rule that makes one name of another and may do so for its neighbours, for a message.

    Example:
        >>> from peftkit.files.rename import suggested
        >>> suggested("blocks.0.self_attn.q", "blocks.0.attn1.q")
        "rename={'blocks.*.self_attn.*': 'blocks.*.attn1.*'}"
    """
    ours, theirs = name.split("."), meant.split(".")
    common = difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_matching_blocks()
    for i, j in ((run.a + k, run.b + k) for run in common for k in range(run.size)):
        if ours[i].isdigit():
            ours[i] = theirs[j] = "*"
    tail = next((run.size for run in common if run.size and run.a + run.size == len(ours)), 0)
    if tail and theirs[-tail:] == ours[-tail:]:
        ours[-tail:] = theirs[-tail:] = ["*"]
    return said(".".join(ours), ".".join(theirs))


def nearest_rule(name: str, path: str, known: Iterable[str]) -> str:
    """Return advice to rename a name as the nearest of some to its path, for a message; "" if none is near."""
    close = difflib.get_close_matches(path, list(known), n=1, cutoff=0.5) if len(path) <= _LONGEST else []
    return f" If {name!r} is {close[0]!r}, pass {suggested(name, close[0])}" if close else ""


# -- files ----------------------------------------------------------------------------------------------------------


class _Relabelled(Mapping[str, T]):
    """Entries under other names, each still read when it is asked for. names: new -> old."""

    def __init__(self, entries: Mapping[str, T], names: Mapping[str, str]) -> None:
        self._entries, self._names = entries, names

    def __getitem__(self, name: str) -> T:
        return self._entries[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Patches(_Relabelled[Patch]):
    """Patches under other names, which name one another by them. renamed: old -> new."""

    def __init__(self, entries: Mapping[str, Patch], names: Mapping[str, str], renamed: Mapping[str, str]) -> None:
        super().__init__(entries, names)
        self._renamed = renamed

    def __getitem__(self, name: str) -> Patch:
        patch = super().__getitem__(name)
        return replace(patch, same_as=self._renamed.get(patch.same_as, patch.same_as)) if patch.same_as else patch


def renamed_as(bundle: AdapterFile) -> str:
    """Return how many names of a file are not its own, and the first, for a report; "" where all are."""
    if not bundle.renamed:
        return ""
    old, new = next(iter(bundle.renamed.items()))
    return f"; {len(bundle.renamed)} names are others than in the file, {old} is {new}"


def names_of(bundle: AdapterFile) -> list[str]:
    """Return every name of a file: of its modules, and of the parameters that trained beside them."""
    modules = [*bundle.patches, *(key.rpartition(".")[0] for key in bundle.vectors)]
    return list(dict.fromkeys([*modules, *bundle.extras]))


def relabelled(bundle: AdapterFile, names: Mapping[str, str]) -> AdapterFile:
    """Return the part of a file that has a new name, under it.

    Args:
        bundle: the file.
        names: old name -> new name, of `names_of` the file; what has none is left out.

    Raises:
        OptionError: two names would become one.
    """
    found: dict[str, str] = {}
    for old, new in names.items():
        if found.setdefault(new, old) != old:
            raise OptionError(f"rename: {found[new]!r} and {old!r} would both be {new!r}: give them different names")
    split = {key: key.rpartition(".") for key in bundle.vectors}
    vectors = {
        f"{names[module]}.{what}".lstrip("."): key for key, (module, _, what) in split.items() if module in names
    }

    def chosen(entries: Iterable[str]) -> dict[str, str]:
        return {names[name]: name for name in entries if name in names}

    return replace(
        bundle,
        patches=_Patches(bundle.patches, chosen(bundle.patches), names),
        vectors=_Relabelled(bundle.vectors, vectors),
        base=_Relabelled(bundle.base, chosen(bundle.base)),
        extras=_Relabelled(bundle.extras, chosen(bundle.extras)),
    )


def renamed(bundle: AdapterFile, renames: Renames) -> AdapterFile:
    """Return a file under other names, with the old ones in `renamed`; the file itself where no rule is of it."""
    if not renames:
        return bundle
    names = {name: renames.of(name) for name in names_of(bundle)}
    names |= {name: renames.of_parameter(name) for name in bundle.extras}
    changed = {old: new for old, new in names.items() if old != new}
    return replace(relabelled(bundle, names), renamed=changed) if changed else bundle
