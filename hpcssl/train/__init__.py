"""Training: recipes, the training step and loop, and one attempt at a run.

As a function, ``hpcssl.train(recipe, run=...)`` trains a recipe: see ``hpcssl.api.train``.
"""

import sys

from hpcssl import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
