"""Every error that peftkit raises. Each names the object, what came, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

#: longer names are no typing errors, and comparing them takes the square of their length
_LONGEST_TYPED = 300


class PeftkitError(Exception):
    """The parent of all errors below."""


class UnknownAdapterError(PeftkitError, KeyError):
    """No adapter algorithm, or no adapter on this model, has that name."""

    def __str__(self) -> str:  # KeyError would print the repr of its argument
        return str(self.args[0])


class OptionError(PeftkitError, ValueError):
    """An option that the algorithm does not have, or a value it cannot take."""


class TargetError(PeftkitError, ValueError):
    """A target pattern that selects nothing, or something that cannot be selected."""


class UnsupportedLayerError(PeftkitError, TypeError):
    """A layer that this adapter cannot adapt without giving a wrong number."""


class TiedWeightsError(PeftkitError, ValueError):
    """A targeted weight is shared with another module and no policy was given."""


class DuplicateNameError(PeftkitError, ValueError):
    """That name is already taken."""


class MergeStateError(PeftkitError, RuntimeError):
    """merge, restore or another verb was called in a state in which it has no meaning."""


class LeftOutWarning(UserWarning):
    """Parameters that trained beside the adapters were left out of a file, as extras=False asks."""


class LostAdapterError(PeftkitError, RuntimeError):
    """A layer was replaced after it was adapted, and its adapter is not in the model any more."""


class SharedParameterError(PeftkitError, RuntimeError):
    """A parameter that several adapters share has become several, which would be trained apart."""


class UnsetAdapterError(PeftkitError, RuntimeError):
    """An adapter or a weight has no values: it was made on the meta device, or is offloaded."""


class MergedFormWarning(UserWarning):
    """An adapter is read as its program merges it, and that program trained another function of the input."""


class NeverRanWarning(UserWarning):
    """Adapters that are installed took no part while the rest of the model ran."""


class CoverageWarning(UserWarning):
    """A preset adapts less than half of the weights that it stands for."""


class ConcurrentBlocksError(PeftkitError, RuntimeError):
    """Two threads or async tasks hold different `disabled` or `enabled` blocks of one compiled model."""


class NotAWeightChangeError(PeftkitError, TypeError):
    """The matrix ΔW was asked of an adapter whose change depends on the layer's input."""


class ChangedTensorError(PeftkitError, RuntimeError):
    """A tensor that backward needs was written to since forward."""


class MergeError(PeftkitError, RuntimeError):
    """A merge that would not do what it says: non-finite, or a weight that did not change."""


class QuantisedMergeError(MergeError):
    """A merge into a quantised weight that was not asked for by `into`, or in which most of a ΔW would not survive."""


class NormError(PeftkitError, RuntimeError):
    """The norm of a ΔW that cannot be limited: it is not finite, or no parameter scales that ΔW."""


class LawError(PeftkitError, AssertionError):
    """An adapter does not keep a law. The message names the law, the layer, the difference and the bound."""


class BenchError(PeftkitError, RuntimeError):
    """A benchmark that would time something wrong, or cannot run here."""


class FileError(PeftkitError, ValueError):
    """A file that is not an adapter file, is damaged, or is not what its header says."""


class AmbiguousFileError(FileError):
    """A file that can be read in two ways. The message names the option that says which."""


class ExportError(PeftkitError, ValueError):
    """An adapter that the target has no exact words for."""


class LossyError(PeftkitError, ValueError):
    """A conversion that was to be exact and would not be."""


class MismatchError(FileError):
    """The file and the model do not fit: missing, unexpected, misshapen or non-finite tensors."""


class FullCheckpointError(MismatchError):
    """A whole wrapped model's tensors where one adapter's were expected."""


class WrongBaseError(FileError):
    """The file was trained on another base."""


@contextmanager
def error_context(subject: object, *others: object) -> Iterator[None]:
    """Prefix a subject to any PeftkitError raised in the block, unless its message already names it.

    Args:
        subject: What is worked on, such as a file.
        *others: Other names of it, which the message may have in place of the subject.

    Example:
        >>> with pk.errors.error_context("a.safetensors"):
        ...     raise pk.errors.FileError("no adapter in it")
        Traceback (most recent call last):
        peftkit.errors.FileError: a.safetensors: no adapter in it
    """
    try:
        yield
    except PeftkitError as error:
        if any(str(named) in str(error) for named in (subject, *others)):
            raise
        raise type(error)(f"{subject}: {error}") from error


def require_file(condition: bool, where: object, what: str) -> None:
    """Raise a FileError that names the place in a file and what is wrong there, unless the condition holds."""
    if not condition:
        raise FileError(f"{where}: {what}")


def require_option(condition: bool, option: str, value: object, expected: str, advice: str = "") -> None:
    """Raise an OptionError that names the option, what came and what was expected, unless the condition holds."""
    if not condition:
        raise OptionError(f"{option}={value!r} was given, {expected} was expected{advice and '.'}{advice}")


def require_choice(option: str, value: object, known: Iterable[object]) -> None:
    """Raise OptionError unless the value is one of the known ones; the error names the nearest.

    Example:
        >>> from peftkit.errors import require_choice
        >>> require_choice("side", "inn", ("in", "out"))
        Traceback (most recent call last):
        peftkit.errors.OptionError: side='inn' was given, 'in' or 'out' was expected. Did you mean 'in'?
    """
    known = tuple(known)
    if value in known:  # nearly always, for every layer of a model: a hint takes longer than the check
        return
    *others, last = map(repr, known)
    expected = f"{', '.join(others)} or {last}" if others else last
    hint = did_you_mean(str(value), map(str, known), count=1)
    require_option(False, option, value, expected, hint)


def require_number(option: str, value: object, *, positive: bool = False) -> None:
    """Raise OptionError unless the value is a finite number (True and False are none) from 0, or above 0."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    fits = fits and not (positive and value == 0)
    require_option(fits, option, value, "a positive, finite number" if positive else "a finite number from 0")


def require_integer(option: str, value: object, least: int, what: str) -> None:
    """Raise OptionError unless the value is an integer (True and False are none) of at least this size."""
    fits = isinstance(value, int) and value is not True and value is not False and value >= least
    require_option(fits, option, value, f"{what} from {least}")


def did_you_mean(word: str, known: Iterable[str], count: int = 3) -> str:
    """Return a hint that names the nearest known words, or an empty string.

    Args:
        word: What was given.
        known: What there is.
        count: How many words to name at most.

    Example:
        >>> from peftkit.errors import did_you_mean
        >>> did_you_mean("lorra", ["lora", "loha", "oft"], count=1)
        " Did you mean 'lora'?"
    """
    if len(word) > _LONGEST_TYPED:
        return ""
    known = (other for other in known if len(other) <= _LONGEST_TYPED)
    close = difflib.get_close_matches(word, list(dict.fromkeys(known)), n=count, cutoff=0.5)
    return f" Did you mean {', '.join(repr(c) for c in close)}?" if close else ""
