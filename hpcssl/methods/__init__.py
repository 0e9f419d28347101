"""The methods by name. A method is added by one file and one line here."""

from hpcssl.methods.byol import Byol, ByolOptions
from hpcssl.methods.cmsf import Cmsf
from hpcssl.methods.constraints import CmsfOptions
from hpcssl.methods.moco import Moco, MocoOptions
from hpcssl.methods.msf import Msf, MsfOptions
from hpcssl.methods.nnclr import Nnclr, NnclrOptions
from hpcssl.methods.nnsiam import Nnsiam, NnsiamOptions
from hpcssl.methods.simclr import SimClr, SimClrOptions
from hpcssl.methods.simsiam import SimSiam, SimSiamOptions
from hpcssl.methods.swav import Swav, SwavOptions

METHODS = {
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
"""Name -> (its options, its class)."""
