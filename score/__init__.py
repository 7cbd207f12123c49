"""Frechet distance and Inception score, computed in the same way for data sets and samples.

`get_npz.py` writes the statistics of a data set, `ddim_eval.py` compares samples with them.
"""
