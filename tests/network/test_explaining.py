"""What the network learned, as arrays."""

import torch

from pipeline.network.cnn import CNN, Architecture, as_input
from pipeline.network.explaining import feature_maps, first_filters, most_confident_mistakes


def test_feature_maps_are_what_the_layers_compute() -> None:
    cnn = CNN(Architecture((28, 28, 1), tuple("0123456789"), (8, 16)), torch.Generator().manual_seed(0))
    image = torch.randint(256, (28, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = feature_maps(cnn, image)
    assert [(layer, tuple(maps.shape)) for layer, maps in found] == [
        ("conv2d", (8, 26, 26)),
        ("max_pooling2d", (8, 13, 13)),
        ("conv2d_1", (16, 11, 11)),
        ("max_pooling2d_1", (16, 5, 5)),
    ]
    torch.testing.assert_close(found[-1].maps, cnn.blocks(as_input(image[None]))[0].detach())
    assert torch.equal(first_filters(cnn), cnn.block_list()[0].convolution.weight)


def test_the_most_confident_mistakes_come_first() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    predicted = torch.tensor([0, 0, 0, 0, 4])
    confidence = torch.tensor([1.0, 0.5, 0.9, 0.7, 1.0])
    assert most_confident_mistakes(labels, predicted, confidence, 2).tolist() == [2, 3]
    assert most_confident_mistakes(labels, predicted, confidence, 10).tolist() == [2, 3, 1]
    assert most_confident_mistakes(labels, labels, confidence, 10).tolist() == []
