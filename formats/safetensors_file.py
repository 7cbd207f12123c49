"""Weights as safetensors, and all that rebuilds the network around them."""

import json


def write(model, stride, folder):
    """model.safetensors and a config.json with the arguments of the network and `Diffusion`."""
    from safetensors.torch import save_file
    state_dict = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state_dict, folder / 'model.safetensors', dict(format='pt'))
    unet_config = model.network.entries.get('unet_config')
    network = dict(unet_config=unet_config) if unet_config else dict(unet=model.arch)
    config = dict(network, diffusion=model.diffusion.arguments(), stride=stride,
                  img_size=model.img_size,
                  training=dict(model.provenance(), weights=model.weights_name))
    (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
