"""The methods by name. To add a method, write one file and add one line here (docs/tutorials/add_method.md)."""

from collections.abc import Callable
from typing import Any

from hpcssl.methods.byol import Byol, ByolOptions
from hpcssl.methods.cmsf.method import Cmsf
from hpcssl.methods.cmsf.options import CmsfOptions
from hpcssl.methods.moco import Moco, MocoOptions
from hpcssl.methods.msf import Msf, MsfOptions
from hpcssl.methods.nnclr import Nnclr, NnclrOptions
from hpcssl.methods.nnsiam import Nnsiam, NnsiamOptions
from hpcssl.methods.simclr import SimClr, SimClrOptions
from hpcssl.methods.simsiam import SimSiam, SimSiamOptions
from hpcssl.methods.swav import Swav, SwavOptions
from hpcssl.views.plan import ViewOptions

METHODS: dict[str, tuple[type[Any], Callable[[Any, ViewOptions], Any]]] = {
    "byol": (ByolOptions, Byol),
    "cmsf": (CmsfOptions, Cmsf),
    "moco": (MocoOptions, Moco),
    "msf": (MsfOptions, Msf),
    "nnclr": (NnclrOptions, Nnclr),
    "nnsiam": (NnsiamOptions, Nnsiam),
    "simclr": (SimClrOptions, SimClr),
    "simsiam": (SimSiamOptions, SimSiam),
    "swav": (SwavOptions, Swav),
}
"""The value of ``method.name`` → (class of the options, class of the method)."""
