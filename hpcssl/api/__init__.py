"""The Python interface: train, evaluate and read runs in this process.

The names are available as ``hpcssl.train``, ``hpcssl.evaluate`` and ``hpcssl.Run``. The commands of ``hpcssl`` call the
same functions. Importing this package does not import torch.
"""

from hpcssl.api.records import Records
from hpcssl.api.run_folder import Run
from hpcssl.api.tasks import evaluate, train

__all__ = ["Records", "Run", "evaluate", "train"]
