"""Kernels that augment a view on a GPU, behind an operator of torch; and whether they are used."""
