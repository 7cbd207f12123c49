"""Facts about a model that travel with it, as JSON."""

import json

ORIGIN = ('method', 'step', 'dataset', 'batch_size', 'seed', 'flags', 'origin')


def origin(model):
    """How a `runtime.models.Model` was trained, and which of its weights were taken."""
    known = {key: model.facts[key] for key in ORIGIN if key in model.facts}
    return dict(known, weights=model.weights)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + '\n')


def read_json(path):
    """The dictionary in a file, or an empty one if there is no such file, or only a part of it."""
    try:
        found = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
