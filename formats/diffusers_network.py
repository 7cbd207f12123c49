"""A `UNet2DModel` of diffusers, called as our U-Net is: for networks that ours cannot express."""

from torch import nn

from formats.packages import check_packages
from runtime.cli import UserError


class DiffusersUNet(nn.Module):
    """A UNet2DModel on a grid with a clean end: our time t is their timestep t - 1.

    Args:
        config: arguments of the UNet2DModel, as plain types.
    """

    in_float32 = ('unet',)      # weights stay as they are: diffusers takes its precision from them

    def __init__(self, config):
        super().__init__()
        check_packages(['diffusers'])
        from diffusers import UNet2DModel
        self.unet = UNet2DModel(**dict(config, dropout=0.))     # see `build`
        for module in self.unet.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(in_precision_of_weights)
        self.conditional = config['num_class_embeds'] is not None
        self.class_num = config['num_class_embeds'] or 10
        self.widths = list(config['block_out_channels'])
        self.stored = dict(unet_config=config)      # its checkpoint says so

    def forward(self, x, t, y=None, noise=None):
        """Images (B, 3, H, W), times (B,) int in 1..N, labels (B,) or None -> (B, 3, H, W)."""
        return self.unet(x, t - 1, y if self.conditional else None, return_dict=False)[0]

    def architecture(self, N):
        """What `runtime.models.architecture` says of our U-Net, for times 0..N."""
        config, widths = self.unet.config, self.widths
        return dict(T=N, ch=widths[0], ch_mult=[width // widths[0] for width in widths],
                    attn=[i for i, name in enumerate(config['down_block_types']) if 'Attn' in name],
                    num_res_blocks=config['layers_per_block'], conditional=self.conditional,
                    class_num=self.class_num)


def in_precision_of_weights(norm, inputs):
    """A hook that gives group norm float32 under autocast, as in `model.GroupNorm`."""
    return tuple(x.to(norm.weight.dtype) for x in inputs)


def build(config, dropout, file):
    """The network with this configuration.

    Raises:
        UserError: dropout is asked for, whose masks would not be those of the step and image.
    """
    if dropout:
        raise UserError(f'--dropout is {dropout} and the network of {file} runs through diffusers, '
                        f'where dropout cannot be repeated after an interruption; set --dropout=0')
    return DiffusersUNet(config)
