"""The networks of docs/coverage.md: one or more of each convolutional family of torchvision and timm.

Weights are random. ``pip install 'fastcascade[coverage]'`` installs both libraries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ARCHITECTURES", "ATTENTION", "NUM_CLASSES", "build", "load_libraries", "sample_images"]

ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "AlexNet": ("torchvision:alexnet",),
    "VGG": ("torchvision:vgg11", "torchvision:vgg16_bn"),
    "SqueezeNet": ("torchvision:squeezenet1_1",),
    "GoogLeNet, Inception": (
        "torchvision:googlenet",
        "torchvision:inception_v3",
        "timm:inception_v4",
        "timm:inception_resnet_v2",
        "timm:inception_next_atto",
    ),
    "Xception": ("timm:legacy_xception", "timm:xception41"),
    "ResNet": ("torchvision:resnet18", "torchvision:resnet50", "timm:resnet26d", "timm:resnetblur50"),
    "Wide ResNet": ("torchvision:wide_resnet50_2",),
    "ResNeXt": ("torchvision:resnext50_32x4d",),
    "ResNet V2, BiT": ("timm:resnetv2_50", "timm:resnetv2_50x1_bit"),
    "Res2Net": ("timm:res2net50_26w_4s",),
    "ResNeSt": ("timm:resnest26d",),
    "SKNet": ("timm:skresnet18",),
    "SE, ECA, CBAM, GC": (
        "timm:legacy_seresnet18",
        "timm:seresnet50",
        "timm:ecaresnet26t",
        "timm:resnet18?attn_layer=cbam",
        "timm:gcresnext26ts",
    ),
    "RegNet": ("torchvision:regnet_x_800mf", "torchvision:regnet_y_800mf", "timm:regnetz_b16"),
    "DenseNet": ("torchvision:densenet121", "timm:densenetblur121d", "timm:rdnet_tiny"),
    "DPN": ("timm:dpn68",),
    "DLA": ("timm:dla34", "timm:dla60_res2net"),
    "VoVNet": ("timm:ese_vovnet19b_dw", "timm:eca_vovnet39b"),
    "HRNet": ("timm:hrnet_w18_small",),
    "HGNet": ("timm:hgnetv2_b0",),
    "SelecSLS": ("timm:selecsls42b",),
    "CSPNet": ("timm:cspresnet50", "timm:cs3darknet_focus_s", "timm:cspnext_tiny"),
    "TResNet": ("timm:tresnet_m",),
    "NFNet": ("timm:dm_nfnet_f0", "timm:eca_nfnet_l0"),
    "NASNet": ("timm:nasnetalarge",),
    "RepVGG": ("timm:repvgg_a0",),
    "MobileOne": ("timm:mobileone_s0", "timm:mobileone_s4"),
    "MobileNet": (
        "timm:mobilenetv1_100",
        "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_large",
        "timm:mobilenetv4_conv_small",
        "timm:mobilenetv4_conv_medium",
    ),
    "MNASNet, MixNet": ("torchvision:mnasnet1_0", "timm:semnasnet_100", "timm:mixnet_s"),
    "EfficientNet": (
        "torchvision:efficientnet_b0",
        "timm:tf_efficientnet_b0",
        "timm:efficientnet_lite0",
        "torchvision:efficientnet_v2_s",
        "timm:efficientnet_es",
    ),
    "FBNet, HardCoRe-NAS, TinyNet": (
        "timm:fbnetc_100",
        "timm:fbnetv3_b",
        "timm:hardcorenas_a",
        "timm:tinynet_a",
    ),
    "LCNet": ("timm:lcnet_100", "timm:lcnetv2_small"),
    "GhostNet": ("timm:ghostnet_100", "timm:ghostnetv2_100", "timm:repghostnet_100"),
    "ShuffleNet": ("torchvision:shufflenet_v2_x1_0",),
    "ReXNet": ("timm:rexnet_100",),
    "ConvNeXt": (
        "torchvision:convnext_tiny",
        "timm:convnext_atto",
        "timm:convnextv2_atto",
        "timm:convformer_s18",
    ),
    "ConvMixer": ("timm:convmixer_768_32",),
    "FasterNet, StarNet, MambaOut": ("timm:fasternet_t0", "timm:starnet_s1", "timm:mambaout_femto"),
    "RepViT": ("timm:repvit_m0_9",),
}
"""By family. ``library:name``, and ``?attn_layer=…`` for timm's ResNet with that attention in its blocks."""

ATTENTION = ("timm:vit_tiny_patch16_224", "timm:swin_tiny_patch4_window7_224", "timm:edgenext_xx_small")
"""Networks with attention over pixels: two of attention alone, and a hybrid. Their stages stay opaque."""

NUM_CLASSES = 1000
_SEED = 20
_LOGIT_SD = 3.0
_CALM, _BRANCH_GAIN = "?calm", 0.2


def build(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A network in eval mode with random weights, the same in every process, and its input shape.

    Batch norms hold the statistics of :func:`sample_images`. Parameters that start as constants, which scale
    branches by 0 or 1e-6, are random as well: otherwise an error in a branch would not show. Logits have
    mean 0 and standard deviation 3 per class over other images: on those that set the norms, some networks'
    logits vary an order of magnitude less.

    A name that ends in "?calm" stands for a network that does not multiply rounding errors, as trained ones
    do not: residual branches add little, and logits differ more from class to class than from image to image.
    """
    calm = name.endswith(_CALM)
    name = name.removesuffix(_CALM)
    torch.manual_seed(_SEED)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums, and so weights, do not depend on the number of threads
    network, shape = _create(name)
    _randomise(network)
    if calm:
        _weaken_branches(network)
    network = _with_statistics_of(network, sample_images(4, shape, _SEED))
    standardised = Standardised(network, sample_images(4, shape, _SEED + 1), by_class=not calm).eval()
    torch.set_num_threads(threads)
    return standardised, shape


def load_libraries() -> tuple[Any, Any]:
    """torchvision and timm, even if torchvision lacks its compiled operators, which no classifier needs."""
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define(
            "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, int pooled_width, "
            "int sampling_ratio, bool aligned) -> Tensor"
        )
        _KEPT.append(library)
    import timm
    import torchvision

    return torchvision, timm


_KEPT: list[torch.library.Library] = []
"""A library's definitions last as long as the object."""


def sample_images(n: int, shape: tuple[int, int, int], seed: int) -> Tensor:
    """(n, C, H, W) float32 with structure at several scales: of white noise, all means would be alike."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(n, *shape)
    for cells in (2, 7, 28, shape[2]):
        noise = torch.randn(n, shape[0], cells, cells, generator=generator)
        images += nn.functional.interpolate(noise, shape[1:], mode="bilinear") / 2
    return images


class Standardised(nn.Module):
    """A network whose logits are brought to mean 0 and standard deviation 3 over some images.

    Args:
        by_class: each class over the images, or else the mean over the images over all classes.
    """

    def __init__(self, network: nn.Module, images: Tensor, by_class: bool = True) -> None:
        super().__init__()
        self.network = network
        with torch.no_grad():
            logits = network(images)
        deviation = logits.std(0).mean() if by_class else logits.mean(0).std()
        self.register_buffer("mean", logits.mean(0) if by_class else logits.mean())
        self.register_buffer("scale", _LOGIT_SD / deviation)

    def forward(self, x: Tensor) -> Tensor:
        return (self.network(x) - self.mean) * self.scale  # type: ignore[no-any-return]


def _create(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    library, _, rest = name.partition(":")
    model, _, option = rest.partition("?")
    torchvision, timm = load_libraries()
    if library == "timm":
        arguments = {"block_args": dict([option.split("=")])} if option else {}
        network = timm.create_model(model, pretrained=False, num_classes=NUM_CLASSES, **arguments)
        return network.eval(), network.default_cfg["input_size"]
    # Their own initialisation takes half a minute, in scipy.
    arguments = {"init_weights": False} if model in ("googlenet", "inception_v3") else {}
    side = 299 if model == "inception_v3" else 224
    return torchvision.models.get_model(model, weights=None, **arguments).eval(), (3, side, side)


@torch.no_grad()
def _randomise(network: nn.Module) -> None:
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.numel() > 1 and parameter.min() < parameter.max():
                continue
            gain = float(parameter.flatten()[0]) == 1 or (name == "weight" and parameter.ndim == 1)
            parameter.uniform_(0.5, 1.5) if gain else parameter.normal_(0, 0.1)


@torch.no_grad()
def _weaken_branches(network: nn.Module) -> None:
    """Scale down the last norm of the residual branches of torchvision's blocks."""
    for block in network.modules():
        kind = type(block).__name__
        if kind in ("BasicBlock", "Bottleneck"):
            (block.bn2 if kind == "BasicBlock" else block.bn3).weight.mul_(_BRANCH_GAIN)
        elif kind == "InvertedResidual" and block.use_res_connect:
            block.conv[-1].weight.mul_(_BRANCH_GAIN)
        elif kind == "MBConv" and block.use_res_connect:
            block.block[-1][1].weight.mul_(_BRANCH_GAIN)


def _with_statistics_of(network: nn.Module, images: Tensor) -> nn.Module:
    """The network after its batch norms, and nothing else, have seen the images in training mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # a plain mean over the batches seen
            module.train()
    with torch.no_grad():
        network(images)
    return network.eval()
