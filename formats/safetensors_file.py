"""Weights as safetensors, and all that rebuilds the network around them."""

from formats import facts


def write(model, stride, folder):
    """model.safetensors and a config.json with the arguments of `UNet` and `Diffusion`."""
    from safetensors.torch import save_file
    state_dict = {key: value.contiguous() for key, value in model.network.state_dict().items()}
    save_file(state_dict, folder / 'model.safetensors', dict(format='pt'))
    facts.write_json(folder / 'config.json', dict(
        unet=model.arch, diffusion=model.diffusion.arguments(), details=model.network.details,
        stride=stride, img_size=model.img_size, training=facts.origin(model)))
