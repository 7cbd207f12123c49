"""What TensorBoard shows of a run that was interrupted: every step once, the same scalars."""

import io
import json
import struct
from collections import Counter

import pytest
from PIL import Image

from helpers import BASE, assert_ran, command, fork_all

# As if the run had been killed before its last checkpoint. Files of events are named by the second
# in which they start.
BETWEEN = """
import sys, time
from pathlib import Path
(Path(sys.argv[1]) / 'ckpt_2.pt').replace(Path(sys.argv[1]) / 'ckpt.pt')
time.sleep(1)
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Folder of a base run of three steps, continued from the second one to four."""
    folder, script = tmp_path_factory.mktemp('board'), tmp_path_factory.mktemp('it') / 'between.py'
    script.write_text(BETWEEN)
    first, second = (command(BASE, f'--logdir={folder}', f'--total_steps={n}', '--sample_step=2')
                     for n in (3, 4))
    assert_ran(fork_all(dict(it=[first, command([str(script)], folder), second]))['it'])
    return folder


def events(file):
    """The events of one file: records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from('<Q', data, at)
        yield Event.FromString(data[at + 12:at + 12 + length])
        at += 16 + length


def written(folder):
    """(step, summary value) in the order in which they were written."""
    return [(event.step, value) for file in sorted(folder.glob('events.out.tfevents.*'))
            for event in events(file) for value in event.summary.value]


def test_events_go_on_where_the_run_did(run):
    """Readers drop what was written before from the step of a new start on."""
    found, count = {}, Counter()
    for step, value in written(run):
        if value.HasField('simple_value'):
            found.setdefault(value.tag, {})[step] = value.simple_value
            count[value.tag, step] += 1
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    assert set(found) == {f'train/{name}' for name in lines[0]} - {'train/step'}
    assert {key for key, times in count.items() if times > 1} == {(tag, 3) for tag in found}
    for name in ('loss', 'lr', 'images_per_s'):
        assert found[f'train/{name}'] == pytest.approx({line['step']: line[name] for line in lines})
    starts = [event.step for file in sorted(run.glob('events.out.tfevents.*'))
              for event in events(file) if event.session_log.status == 1]
    assert starts == [1, 3]


def test_grids_and_flags(run):
    grids = {step: value.image for step, value in written(run) if value.HasField('image')}
    assert list(grids) == [2, 4]
    for step, image in grids.items():
        with Image.open(io.BytesIO(image.encoded_image_string)) as picture:
            with Image.open(run / f'sample/{step}.png') as file:
                assert picture.size == (image.width, image.height) == file.size
                assert picture.tobytes() == file.tobytes()
    texts = {step: value.tensor.string_val[0].decode() for step, value in written(run)
             if value.tag.startswith('flags')}
    assert list(texts) == [0, 2]
    assert '    --total_steps=4\n' in texts[2] and '    --T=8\n' in texts[2]
