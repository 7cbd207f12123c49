"""What TensorBoard shows of a run that was interrupted: every step once, the same scalars."""

import io
import json
import struct

import pytest
from PIL import Image

from helpers import assert_ran, command, fork_all

BASE = ('train_base.py --dataset=digits --img_size=8 --ch=32 --ch_mult=1 --attn=0 '
        '--num_res_blocks=1 --batch_size=8 --num_workers=0 --log_step=1 --T=8 --save_step=2 '
        '--sample_step=2 --sample_size=4 --warmup=2').split()


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
    first, second = (command(BASE, f'--logdir={folder}', f'--total_steps={n}') for n in (3, 4))
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


def scalars(folder):
    """{name: {step: value}} of the section train, and how often each (name, step) was."""
    found, count = {}, {}
    for step, value in written(folder):
        if value.HasField('simple_value'):
            section, name = value.tag.split('/')
            assert section == 'train'
            found.setdefault(name, {})[step] = value.simple_value
            count[name, step] = count.get((name, step), 0) + 1
    return found, count


def test_events_go_on_where_the_run_did(run):
    found, count = scalars(run)
    assert {'loss', 'lr', 'images_per_s'} <= set(found)
    for tag in ('loss', 'lr', 'images_per_s'):
        assert sorted(found[tag]) == [1, 2, 3, 4], tag
    assert {key for key, times in count.items() if times > 1} == {(name, 3) for name in found}
    starts = [event.step for file in sorted(run.glob('events.out.tfevents.*'))
              for event in events(file) if event.session_log.status == 1]
    assert starts == [1, 3]         # readers drop what was written before from step 3 on
    assert [found['lr'][step] for step in (1, 2, 3, 4)] == pytest.approx([1e-4, 2e-4, 2e-4, 2e-4])
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == [1, 2, 3, 4]
    losses = {line['step']: line['loss'] for line in lines}
    assert found['loss'] == pytest.approx(losses)


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


def test_tensorboard_reads_them(run):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator',
                                 reason='optional: pip install tensorboard')
    board = reader.EventAccumulator(str(run)).Reload()
    assert [event.step for event in board.Scalars('train/loss')] == [1, 2, 3, 4]
