"""Constrained mean shift (CMSF): the method, and the rules that say which bank rows may be neighbors.

``method.py`` has the loss, ``options.py`` the recipe keys. Each value of ``method.rule`` has a file of its name, with
one class. It has ``neighbors``, which finds the neighbors that the rule allows; ``vectors`` and ``numbers``, the bank
columns that it needs (``BankSpec``); and those functions of ``StateHooks`` that it needs. The rules use
``constraint.py`` (the search), ``clusters.py`` (k-means) and ``pseudo_labels.py``.
"""
