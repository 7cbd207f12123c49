"""Batches that worker processes read from the disk."""

import signal

from torch.utils.data import DataLoader, Dataset, default_collate

from runtime.cli import UserError


def load(dataset, num_workers, **options):
    """The batches of a `DataLoader`, once through its data set or its sampler.

    An exception that leaves a worker is raised again with its traceback as the message. A
    `UserError` therefore travels to this process as a value and is raised here.

    Args:
        dataset: map-style, `dataset[i]` is one item. num_workers: processes; 0: this one reads.
        options: further arguments of `torch.utils.data.DataLoader`.
    Yields:
        batches of items, stacked as torch's `default_collate` does it.
    Raises:
        UserError: that of the first item that cannot be read, at the batch that holds it.
    """
    problem = None
    for batch in DataLoader(_ErrorsAsItems(dataset), num_workers=num_workers,
                            collate_fn=_collate, worker_init_fn=_let_the_step_finish,
                            persistent_workers=num_workers > 0, **options):
        if isinstance(batch, UserError):
            problem = batch
            break
        yield batch
    if problem is not None:     # raised here because the workers end with the loop
        raise problem


class _ErrorsAsItems(Dataset):
    """A data set whose items are those of `dataset`, or the `UserError` that reading one raised."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        try:
            return self.dataset[i]
        except UserError as error:
            return error


def _collate(items):
    """One batch, or the first error among its items."""
    for item in items:
        if isinstance(item, UserError):
            return item
    return default_collate(items)


def _let_the_step_finish(worker):
    """Let this worker ignore SIGINT and end 30 seconds after SIGTERM.

    A terminal or a launcher sends its signal to the workers as well, and the main process still
    needs their images to finish the current step.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))
