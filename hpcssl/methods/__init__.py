"""The methods by name. A method is added by one file and one line here."""

from hpcssl.methods.byol import Byol, ByolOptions
from hpcssl.methods.msf import Msf, MsfOptions

METHODS = {
    "byol": (ByolOptions, Byol),
    "msf": (MsfOptions, Msf),
}
"""Name -> (its options, its class)."""
