"""The twelve data sets of the transfer protocol: published layouts become train, val and test.

Classes, sizes of the splits and what is held out for validation follow appendix D (table 10) of BYOL, which NNCLR
also uses. Sizes are compared with them, so that a wrong or an incomplete folder is reported before anything is
written.
"""
