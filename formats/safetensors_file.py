"""Weights as safetensors, and all that rebuilds the network around them."""

from formats import facts


def write(model, stride, folder):
    """model.safetensors and a config.json with the arguments of the network and `Diffusion`."""
    from safetensors.torch import save_file
    state_dict = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state_dict, folder / 'model.safetensors', dict(format='pt'))
    if 'unet_config' in model.facts:
        network = dict(unet_config=model.facts['unet_config'])
    else:
        network = dict(unet=model.arch, details=model.network.details)
    facts.write_json(folder / 'config.json', dict(
        network, diffusion=model.diffusion.arguments(), stride=stride, img_size=model.img_size,
        training=facts.origin(model)))
