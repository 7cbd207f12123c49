"""Frechet distance and Inception score, computed in the same way for data sets and samples.

`get_npz.py` writes the statistics of a data set, `ddim_eval.py` compares samples with them.
"""

from score.metrics import ActivationStats, frechet_distance, inception_score
from score.networks import load_feature_network
from score.reference import check_reference, load_statistics, save_statistics

__all__ = ['ActivationStats', 'check_reference', 'frechet_distance', 'inception_score',
           'load_feature_network', 'load_statistics', 'save_statistics']
