"""Built-in networks, their names and costs, and cutting them into segments."""

import warnings

import pytest
import torch
from torch import Tensor, nn

import fastcascade as fc
from fastcascade.errors import InvalidArgument
from fastcascade.model.cost import count_macs, eval_mode
from fastcascade.model.pooled_net import mirrored_pooled_net, pooled_net
from fastcascade.model.registry import build_network
from fastcascade.model.resnet import cut_into_segments, resnet9, resnet_cifar, resnet_imagenet

IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("depth", "millions"), [(8, 12.2), (14, 26.4), (20, 40.6), (56, 125.5), (110, 252.9)]
)
def test_cifar_networks_cost_what_the_literature_says(depth, millions):
    assert count_macs(resnet_cifar(depth), IMAGE)[1] / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(
    ("depth", "giga", "parameters"),
    [(18, 1.81, 11_689_512), (50, 4.09, 25_557_032), (152, 11.51, 60_192_808)],
)
def test_imagenet_networks_have_the_known_size(depth, giga, parameters):
    network = resnet_imagenet(depth)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert count_macs(network, torch.zeros(1, 3, 224, 224))[1] / 1e9 == pytest.approx(giga, abs=0.02)


def test_shortcut_a_has_no_weights_and_b_has_convolutions():
    a, b = (resnet_cifar(20, shortcut=s) for s in "AB")
    assert sum(p.numel() for p in b.parameters()) - sum(p.numel() for p in a.parameters()) == (
        16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    )
    x = torch.randn(2, 16, 8, 8)
    padded = a.blocks[3].shortcut(x)
    assert torch.equal(padded[:, 8:24], x[:, :, ::2, ::2])
    assert int(padded[:, :8].count_nonzero() + padded[:, 24:].count_nonzero()) == 0


@pytest.mark.parametrize(
    "network", [resnet_cifar(20), resnet9(8), resnet_imagenet(18, 7), resnet_imagenet(50, 7)]
)
def test_segments_in_a_row_are_the_network(network):
    network.eval()
    x = torch.randn(2, 3, 64, 64)
    count = len(network.blocks)
    segments = cut_into_segments(network, [1, count // 2])
    features = x
    with eval_mode(*(m for pair in segments for m in pair)):
        for segment, head in segments:
            features = segment(features)
            logits = head(features)
        torch.testing.assert_close(logits, network(x))


def test_names_build_networks_with_options():
    network = build_network("resnet_cifar:20,width=32,shortcut=B", 100)
    assert network.head[-1].in_features == 128
    assert network.architecture == "resnet_cifar:20,width=32,shortcut=B"
    assert build_network("resnet9:8,stem=16", 10).stem[0].out_channels == 16


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: resnet_cifar(9), "6n\\+2"),
        (lambda: resnet_cifar(8, shortcut="C"), "'A' or 'B'"),
        (lambda: resnet_imagenet(20), "one of"),
        (lambda: build_network("vgg:16", 10), "known families"),
        (lambda: build_network("resnet_cifar", 10), "no size"),
        (lambda: build_network("resnet_cifar:8,depth=3", 10), "bad option 'depth=3'"),
        (lambda: build_network("resnet9:8,stem=", 10), "bad option"),
        (lambda: cut_into_segments(resnet_cifar(8), [2, 1]), "increasing"),
        (lambda: cut_into_segments(resnet_cifar(8), [3]), "1 … 2"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(InvalidArgument, match=words):
        call()


class Convolved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


def test_what_cannot_be_counted_warns_and_the_rest_does_not():
    with pytest.warns(UserWarning, match="fft"):
        count_macs(Convolved(), IMAGE)
    layers = nn.Sequential(
        nn.Conv2d(3, 6, 5, stride=2, padding=2, groups=3), nn.BatchNorm2d(6), nn.Hardtanh(0, 6), nn.Dropout(),
        nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 7), nn.Softmax(1),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_macs(layers, IMAGE)[1] == 6 * 16 * 16 * 25 + 96 * 7


@pytest.mark.parametrize(
    "name", ["resnet_cifar:8", "resnet9:4", "resnet_imagenet:18", "pooled_net:8", "mirrored_pooled_net:8"]
)
@pytest.mark.parametrize("channels", [1, 5])
def test_every_family_reads_any_number_of_channels(name, channels):
    network = build_network(name, 7, channels).eval()
    assert network(torch.zeros(2, channels, 32, 32)).shape == (2, 7)
    assert network.architecture == f"{name},in_channels={channels}"
    again = build_network(network.architecture, 7)
    assert repr(again) == repr(network)


def test_the_name_wins_over_the_number_of_channels():
    assert build_network("resnet_cifar:8,in_channels=2", 3, 1).architecture == "resnet_cifar:8,in_channels=2"


@pytest.mark.parametrize("channels", [0, -1, 1.5])
def test_impossible_channels_are_refused(channels):
    for build in (resnet_cifar, resnet9, pooled_net, mirrored_pooled_net):
        with pytest.raises(InvalidArgument, match="in_channels is"):
            build(8, in_channels=channels)


def test_gray_images_from_saving_to_prediction(tmp_path):
    cascade = fc.Cascade(
        [resnet_cifar(8, in_channels=1), *cut_gray()],
        fc.MLPSelector(),
        10,
        (1, 32, 32),
        preprocess=fc.Normalize((0.5,), (0.25,)),
    )
    cascade.save(tmp_path)
    x = torch.randint(0, 256, (6, 1, 32, 32), dtype=torch.uint8)
    loaded = fc.load(tmp_path)
    assert torch.equal(loaded(x).probs, cascade(x).probs)
    assert fc.predict(loaded, x[:, 0].numpy()).label.tolist() == fc.compile(cascade)(x).label.tolist()


def cut_gray():
    (first, head), (rest, last) = cut_into_segments(resnet_cifar(14, in_channels=1), after=[2])
    return [fc.Stage(first, head), fc.Stage(rest, last, input="previous")]
