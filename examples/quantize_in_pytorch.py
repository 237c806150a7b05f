"""The linear layers of a PyTorch model on cvmk's 8-bit and 4-bit kernels: `quantize_module`."""

import copy

import torch

from cvmk.nn import quantize_module


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256)).eval()
    x = torch.randn(8, 256)
    expected = model(x)
    for scheme in ("w8a8", "w4a16", "w4a8"):
        small = quantize_module(copy.deepcopy(model), scheme)
        error = ((small(x) - expected).norm() / expected.norm()).item()
        size = sum(tensor.nbytes for tensor in small.state_dict().values()) / sum(tensor.nbytes for tensor in model.state_dict().values())
        print(f"{scheme}: {size:.2f} of the size, relative error {error:.4f}")


if __name__ == "__main__":
    main()
