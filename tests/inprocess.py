"""What tests of scripts in their own process share: flags, and a network that scores."""

import contextlib

import numpy as np
from absl import flags

from classifier import build_classifier
from runtime import checkpoint
from score.reference import Statistics, save_statistics

FLAGS = flags.FLAGS


@contextlib.contextmanager
def parsing(define):
    """Gives parse('--lr=1', ..): the command line of a script with the flags of `define()`."""
    before = set(FLAGS)
    define()
    own = set(FLAGS) - before

    def parse(*words):
        for name in own:
            FLAGS[name].unparse()
        FLAGS(['script', *map(str, words)])

    yield parse
    for name in own:
        delattr(FLAGS, name)


def make_scorer(folder, name='convnet_small'):
    """Write classifier.pt, not trained, and stats.npz; returns flags that score with them."""
    network = build_classifier(name, 10)
    checkpoint.save(folder / 'classifier.pt', dict(model=network.state_dict(), name=name))
    size = network.num_features
    save_statistics(folder / 'stats.npz', Statistics(np.zeros(size), np.eye(size)))
    return [f'--fid_cache={folder}/stats.npz', f'--feature_network={folder}/classifier.pt']
