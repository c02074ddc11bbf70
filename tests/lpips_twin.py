"""LPIPS-VGG in torch, with the weights of ours."""

import numpy as np

from lwd_jax.objective import lpips


def lpips_twin(torch, params):
    """torchvision's VGG16 `features`, cut after the five taps, and the published forward pass of LPIPS."""
    layers, taps, layer = [], [], 0
    for stage, widths in enumerate(lpips.STAGES):
        layers += [torch.nn.MaxPool2d(2, 2)] if stage else []
        for _ in widths:
            kernel = torch.tensor(np.asarray(params[f"conv{layer}.kernel"])).permute(3, 2, 0, 1)
            convolution = torch.nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, padding=1)
            convolution.weight.data = kernel.contiguous()
            convolution.bias.data = torch.tensor(np.asarray(params[f"conv{layer}.bias"]))
            layers += [convolution, torch.nn.ReLU()]
            layer += 1
        taps.append(len(layers) - 1)
    assert taps == [3, 8, 15, 22, 29]  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
    network = torch.nn.Sequential(*layers).requires_grad_(False)
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]

    def unit_features(x):
        x, found = (x - shift) / scale, []
        for index, module in enumerate(network):
            x = module(x)
            if index in taps:
                found.append(x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        return found

    def distance(x, y):
        total = 0
        for stage, (a, b) in enumerate(zip(unit_features(x), unit_features(y))):
            head = torch.tensor(np.asarray(params[f"head{stage}"]))[None, :, None, None]
            total = total + ((a - b).pow(2) * head).sum(1).mean((1, 2))
        return total

    return distance
