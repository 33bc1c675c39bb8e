"""What commands have in common: arguments, options, and groups of options that are dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from peftkit.cli.strengths import number, rules
from peftkit.cli.terminal import DTYPES, OUT, show

if TYPE_CHECKING:
    from peftkit.files.read import Reading

# Values of options, as the library has them, whose modules import torch: help and completion do without
KINDS = ("lora", "loha", "lokr", "full")
EXTRACTED = ("lora", "lokr", "full")
METHODS = ("linear", "cat", "svd", "ties", "dare")
TARGETS = ("a1111", "forge", "comfyui", "kohya", "lycoris", "diffusers", "peft", "llama.cpp", "vllm", "sglang")


def completion(words: tuple[str, ...]) -> Callable[[str], list[str]]:
    """Return what a shell asks to complete a value: the words that begin as it does, after its last comma."""

    def complete(incomplete: str) -> list[str]:
        before, comma, begun = incomplete.rpartition(",")
        return [before + comma + word for word in words if word.startswith(begun)]

    return complete


def among(*names: str, words: tuple[str, ...], help: str = "") -> Any:
    """An option whose value is one of some words, which its help lists and shells complete."""
    text = f"{help} One of {', '.join(words)}.".strip()
    return typer.Option(*names, help=text, autocompletion=completion(words))


File = Annotated[str, typer.Argument(help="An adapter file, a folder of PEFT, or its name on the hub.")]
Checkpoint = Annotated[Path, typer.Argument(help="The checkpoint: a file, a folder of shards, or of a pipeline.")]
_ADAPTERS = typer.Argument(
    help="FILE, FILE=NUMBER, FILE=PATTERN=NUMBER,… or FILE=RULES.json, which holds {pattern: number}.",
    metavar="FILE[=STRENGTH]...",
)
Adapters = Annotated[list[str], _ADAPTERS]
AnyAdapters = Annotated[list[str] | None, _ADAPTERS]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
All = Annotated[bool, typer.Option("--all", help="List every module, not one line for all that are alike.")]
Force = Annotated[
    bool, typer.Option("--force", help="Write over what is there, also over an input; never what is read-only.")
]
Dtype = Annotated[str | None, among("--dtype", words=tuple(DTYPES), help="Of the tensors.")]
Rename = Annotated[
    list[str] | None,
    typer.Option(help="OLD=NEW: other names for the modules that the pattern OLD matches.", metavar="OLD=NEW"),
]
Factor = Annotated[int, typer.Option(help="The bound on LoKr's small factor.")]


@dataclass(frozen=True)
class ReadingOptions:
    """How adapter files are read."""

    dora_axis: Annotated[str | None, typer.Option(help="out or in: what a file's square DoRA vector is per.")] = None
    alpha_zero: Annotated[str | None, typer.Option(help="off or rank: what α = 0 means in a file.")] = None
    alpha: Annotated[
        str | None, typer.Option(help="α where a file does not say it: a number, or rank for a scale of 1.")
    ] = None
    ignore: Annotated[list[str] | None, typer.Option(help="A pattern of keys in adapter files to leave out.")] = None
    rename: Rename = None
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .pt, .ckpt and .bin files, as data only.")
    ] = False

    @property
    def given(self) -> Reading:
        """As the library's functions take them."""
        return {
            "dora_axis": self.dora_axis,
            "alpha_zero": self.alpha_zero,
            "alpha": self.alpha if self.alpha in (None, "rank") else number(self.alpha),
            "ignore": self.ignore or (),
            "rename": rules(self.rename or []),
            "allow_pickle": self.allow_pickle,
        }


@dataclass(frozen=True)
class BaseOptions:
    """The base of adapters that read theirs."""

    base: Annotated[Path | None, typer.Option("--base", help="The checkpoint the adapter is for.")] = None
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Accept a base other than the one a file was trained on.")
    ] = False

    @property
    def given(self) -> dict[str, Any]:
        """As the library's functions take them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RankOptions:
    """Which ranks are kept."""

    rank: Annotated[int | None, typer.Option(help="How many ranks to keep.")] = None
    energy: Annotated[float | None, typer.Option(help="Keep this share of ‖ΔW‖².")] = None
    threshold: Annotated[float | None, typer.Option(help="Keep singular values of this share of the largest.")] = None

    @property
    def given(self) -> dict[str, Any]:
        """As the library's functions take them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class RebaseOptions:
    """What adapters that read their base do on another one."""

    rebase: Annotated[
        str,
        among(
            "--rebase", words=("reapply", "transplant"), help="What adapters do that read their base, on another one."
        ),
    ] = "reapply"
    origin: Annotated[Path | None, typer.Option(help="The base the adapters were trained on.")] = None
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Accept a base other than the one a file was trained on.")
    ] = False

    @property
    def given(self) -> dict[str, Any]:
        """As the library's functions take them."""
        return dataclasses.asdict(self)


Variant = Annotated[
    str | None, typer.Option("--variant", help="Of the files in a folder, such as fp16; the plain ones by default.")
]


@dataclass(frozen=True)
class PartOptions:
    """Which part and which files of a checkpoint's folder are meant."""

    component: Annotated[
        str | None, typer.Option("--component", help="The part of a pipeline that the adapters are for.")
    ] = None
    variant: Variant = None

    @property
    def given(self) -> dict[str, Any]:
        """As the library's functions take them."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class BudgetOptions:
    """Ranks of a new adapter within a budget."""

    budget: Annotated[
        str | None, typer.Option("--budget", help="Plan the ranks of a new adapter instead: what it may take, as 5MB.")
    ] = None
    kind: Annotated[str | None, typer.Option("--kind", "-k", help="With a budget: the kind, by default lora.")] = None
    target: Annotated[
        list[str] | None, typer.Option("--target", help="With a budget: a pattern of weights to adapt.")
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="With a budget: a pattern of weights to leave out.")
    ] = None
    scores: Annotated[
        Path | None, typer.Option(help="With a budget: JSON of {weight: [what each rank is worth, …]}.")
    ] = None
    tuned: Annotated[
        Path | None,
        typer.Option(help="With a budget: a fine-tuned checkpoint; its difference says what ranks are worth."),
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """What was given of them, beside the budget itself."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value and name != "budget"}


@dataclass(frozen=True)
class OutputOptions:
    """Where a result goes, and how it is reported."""

    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
    force: Force = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; write nothing.")] = False
    as_json: Json = False
    every: All = False

    def write(self, make: Callable[[Path], Any], *inputs: object) -> Any:
        """Make the output and show the report; for a dry run make it in a folder that is removed at once."""
        if not self.dry_run:
            report = make(self.out)
        else:
            from peftkit.files.formats.disk import require_output

            require_output(self.out, inputs, self.force)
            with tempfile.TemporaryDirectory() as folder:
                report = dataclasses.replace(make(Path(folder) / self.out.name), path=self.out)
        show(report, self.as_json, report.table(every=self.every))
        self.conclude()
        return report

    def conclude(self) -> None:
        """Say that the output is there, or that nothing is."""
        if not self.as_json:
            said = "dry run: nothing was written" if self.dry_run else f"wrote {self.out}"
            OUT.print(said, soft_wrap=True)


_Command = TypeVar("_Command", bound=Callable[..., None])


def grouped(command: _Command) -> _Command:
    """Give a command the options of every parameter that is a dataclass of options, one by one.

    Example:
        >>> from peftkit.cli.options import ReadingOptions, grouped
        >>> def show(file: str, reading: ReadingOptions) -> None: ...
        >>> list(inspect.signature(grouped(show)).parameters)
        ['file', 'dora_axis', 'alpha_zero', 'alpha', 'ignore', 'rename', 'allow_pickle']
    """
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: hints[name] for name in parameters if dataclasses.is_dataclass(hints[name])}
    flat: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        flat += _options(groups[name]) if name in groups else [parameter.replace(annotation=hints[name])]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    flat = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in flat]
    run.__dict__["__signature__"] = inspect.Signature(flat)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run  # pyright: ignore[reportReturnType]  # the same command, told another way


def _options(group: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(group)
    ]
