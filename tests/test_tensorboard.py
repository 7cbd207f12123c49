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


def events(file):
    """The events of one file: records of length, checksum, content, checksum."""
    from tensorboardX.proto.event_pb2 import Event
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from('<Q', data, at)
        yield Event.FromString(data[at + 12:at + 12 + length])
        at += 16 + length


def test_a_run_that_goes_on(tmp_path):
    """Three steps, then from the second one to four: readers drop what a new start repeats."""
    folder, script = tmp_path / 'run', tmp_path / 'between.py'
    script.write_text(BETWEEN)
    first, second = (command(BASE, f'--logdir={folder}', f'--total_steps={n}', '--sample_step=2')
                     for n in (3, 4))
    assert_ran(fork_all(dict(it=[first, command([str(script)], folder), second]))['it'])
    scalars, count, grids, texts, starts = {}, Counter(), {}, {}, []
    for event in (event for file in sorted(folder.glob('events.out.tfevents.*'))
                  for event in events(file)):
        starts += [event.step] if event.session_log.status == 1 else []
        for value in event.summary.value:
            if value.HasField('simple_value'):
                scalars.setdefault(value.tag, {})[event.step] = value.simple_value
                count[value.tag, event.step] += 1
            elif value.HasField('image'):
                grids[event.step] = value.image.encoded_image_string
            elif value.tag.startswith('flags'):
                texts[event.step] = value.tensor.string_val[0].decode()
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4] and starts == [1, 3]
    assert set(scalars) == {f'train/{name}' for name in lines[0]} - {'train/step'}
    assert {key for key, times in count.items() if times > 1} == {(tag, 3) for tag in scalars}
    for name in ('loss', 'lr', 'images_per_s'):
        assert scalars[f'train/{name}'] == pytest.approx(
            {line['step']: line[name] for line in lines})
    assert list(grids) == [2, 4] and list(texts) == [0, 2]
    assert '    --total_steps=4\n' in texts[2] and '    --T=8\n' in texts[2]
    for step, image in grids.items():
        with Image.open(io.BytesIO(image)) as one, Image.open(folder / f'sample/{step}.png') as two:
            assert one.size == two.size and one.tobytes() == two.tobytes()
