"""Evaluations on frozen features: k-NN, support vector machines and transfer."""
