"""Snapshots of EDM: pickles of whole objects, read without running anything in them.

Every class and function in the pickle must be on a list, and becomes an inert record of its
arguments. Tensors are made from the records afterwards; the source text in them is not used.
"""

import io
import pickle
import pickletools

import torch

from formats import edm, guided_diffusion
from formats.entries import brief
from formats.load import choose_weights
from runtime.cli import UserError

DICTS = 'collections.OrderedDict', 'dnnlib.util.EasyDict'
RECORDS = ('torch_utils.persistence._reconstruct_persistent_obj', 'numpy.dtype',
           'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar',     # before, after 2.0
           'torch._utils._rebuild_parameter', 'torch._utils._rebuild_tensor_v2',
           'torch.storage._load_from_bytes', 'torch.nn.modules.container.ModuleDict')
# arguments of the network that have one value here, and those without a meaning here
FIXED = dict(img_channels=3, decoder_type='standard', sigma_data=.5, beta_d=19.9, beta_min=.1,
             M=1000, epsilon_t=1e-5, C_1=.001, C_2=.008)
UNUSED = ('use_fp16', 'dropout', 'label_dropout', 'sigma_min', 'sigma_max', 'model_type')


def teacher(path, steps):
    """(entries of the checkpoint of an `EDMNetwork`, its weights) of a snapshot."""
    name, arguments, weights = read(path)
    network = arguments.get('model_type')
    if name not in edm.PRECONDITIONING or network not in ('SongUNet', 'DhariwalUNet'):
        raise UserError(f'{path} is a {name} with a {network}, expected a class of EDM (not EDM2) '
                        f'such as EDMPrecond with a SongUNet or DhariwalUNet; give another model')
    for key, value in FIXED.items():
        if arguments.get(key, value) != value:
            raise UserError(f'{key} of {path} is {brief(arguments[key])}, expected {value}; give '
                            f'another model')
    _, weights = choose_weights(dict(net_model=weights), 'net', path)
    if name == 'iDDPMPrecond':      # the last three outputs are the variance
        weights = {key: value[:3] if '_aux_conv.' in key or '.out_conv.' in key else value
                   for key, value in weights.items()}
    size, entries = arguments['img_resolution'], edm.entries(name, steps)
    if network == 'SongUNet':
        entries['edm']['song'] = dict(edm.DEFAULTS, **{
            key: value for key, value in arguments.items() if key not in (*FIXED, *UNUSED)})
        return dict(entries, img_size=size), weights
    inner = {key[len('model.'):]: value for key, value in weights.items() if key != 'u'}
    config, unet = guided_diffusion.convert(
        inner, size, 'edm', 0, arguments.get('channels_per_head', 64), path, name)
    unet.update({key: weights[key] for key in ('u',) if key in weights})
    return dict(entries, unet_config=config, img_size=size), unet


class Record:
    def __new__(cls, *args):
        record = object.__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state):
        self.args = [dict(version=6, state=state)]      # as those of a whole object


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        path = f'{module}.{name}'
        if path not in DICTS + RECORDS:
            raise UserError(f'refers to {path[:80]!r}, which no snapshot of EDM needs and which '
                            f'could run code; nothing was run, give the original file')
        return type(name, (dict if path in DICTS else Record,), {})


def read(path):
    """(class, its arguments, {name: tensor}) of the network `ema`, unchecked."""
    try:
        with open(path, 'rb') as file:
            check_size(file, file.seek(0, 2))
            file.seek(0)
            found = Unpickler(file).load()
        state_dict, meta = dict(tensors(found['ema'], set())), found['ema'].args[0]
        return meta['class_name'], meta['state']['_init_kwargs'], state_dict
    except UserError as error:
        raise UserError(f'{path} {error}')
    except Exception:       # the bytes of the file decide what is raised
        raise UserError(f'{path} is damaged, or no snapshot of EDM with a network "ema"; download '
                        f'it again')


def check_size(file, size):
    """Refuse what takes much more memory or stack than the 9e4 operations of a large snapshot."""
    file.seek(0)
    tuples = 0      # to hash 1e5 tuples inside each other overflows the stack
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        tuples += operation.name.startswith('TUPLE')
        index = argument if 'PUT' in operation.name else 0      # takes memory for all below it
        if size > 2 ** 33 or max(count, index) > 10 ** 6 or tuples > 2 * 10 ** 4:
            raise UserError('is larger than any snapshot of EDM; give the original file')


def tensors(module, seen, prefix=''):
    """(name, tensor) of the record of a module and of those in it, in the order of torch."""
    meta = module.args[0]
    if meta['version'] != 6:
        raise UserError(f'has an object of version {str(meta["version"])[:20]}, expected 6; save '
                        f'it again with the code of EDM')
    if id(module) in seen:
        raise UserError('has a module inside itself; give the original file')
    seen.add(id(module))
    state = meta['state']
    for name, record in {**state['_parameters'], **state['_buffers']}.items():
        if record is not None and name not in state['_non_persistent_buffers_set']:
            yield prefix + name, tensor(record, seen)
    for name, child in state['_modules'].items():
        if child is not None:
            yield from tensors(child, seen, f'{prefix}{name}.')


def tensor(record, seen):
    """The tensor of a record, no larger than the bytes of its storage, which no other one has."""
    if type(record).__name__ == '_rebuild_parameter':
        record = record.args[0]
    data, (offset, size, stride) = record.args[0].args[0], record.args[1:4]
    storage = torch.load(io.BytesIO(data), map_location='cpu', weights_only=True)
    flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    found = flat.as_strided(size, stride, offset)
    if max(flat.nbytes, found.nbytes) > len(data) or id(data) in seen:
        raise UserError('has more tensors than bytes for them; give the original file')
    seen.add(id(data))
    return found.clone()
