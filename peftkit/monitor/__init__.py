"""Watch a training run through its weights: the cosine of ΔW and W, its fluctuation, and when to stop.

The room reads live models and writes logs and pictures; it may import all of peftkit but `cli` and `bench`. Public are
the names below, and the callbacks in `monitor.trainer` (transformers) and `monitor.lightning`, imported by their paths.
"""

from peftkit.monitor.advice import Advice as Advice
from peftkit.monitor.advice import Criterion as Criterion
from peftkit.monitor.cs import CSMonitor as CSMonitor
from peftkit.monitor.early_stopping import EarlyStopping as EarlyStopping
from peftkit.monitor.fluctuation import Fluctuation as Fluctuation
from peftkit.monitor.fluctuation import SecondValley as SecondValley
from peftkit.monitor.fluctuation import TurningPoint as TurningPoint
from peftkit.monitor.logs import JsonLines as JsonLines
from peftkit.monitor.logs import LiveLine as LiveLine
from peftkit.monitor.logs import Row as Row
from peftkit.monitor.logs import read_run as read_run
from peftkit.monitor.record import Record as Record
from peftkit.monitor.rerun import replay as replay
from peftkit.monitor.spectrum import Spectrum as Spectrum
from peftkit.monitor.spectrum import spectra as spectra
