"""Image classifiers whose features the distillation and the scores are made of.

`build_classifier` makes a network, `load_classifier` a trained and frozen one; `train.py` trains.
"""

from classifier.frozen import NORMALISATIONS, load_classifier, load_frozen, load_imagenet
from classifier.networks import build_classifier

__all__ = ['NORMALISATIONS', 'build_classifier', 'load_classifier', 'load_frozen', 'load_imagenet']
