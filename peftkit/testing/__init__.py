"""Laws that every adapter kind keeps, to be checked for one of your own. Needs nothing but peftkit itself.

Public: `check_laws`, and the report that it returns.
"""

from peftkit.testing.check import LawReport as LawReport
from peftkit.testing.check import check_laws as check_laws
