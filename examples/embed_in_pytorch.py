"""One of cvmk's operators inside a PyTorch module of your own, compiled, with the reasons for the choice of its kernel."""

import torch

from cvmk import ops


class SelfAttention(torch.nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = ops.flash_attention(q, k, v, key_lengths=lengths)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


def main() -> None:
    torch.manual_seed(0)
    module = SelfAttention(width=64, heads=4)
    x, lengths = torch.randn(3, 10, 64), torch.tensor([10, 4, 0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    difference = (compiled(x, lengths) - module(x, lengths)).abs().max().item()
    compiled(x, lengths).sum().backward()
    print(f"compiled and eager differ by {difference:.1e}")
    q = torch.randn(3, 4, 10, 16)
    for answer in ops.explain("flash_attention", q, q, q, key_lengths=lengths):
        print(answer)


if __name__ == "__main__":
    main()
