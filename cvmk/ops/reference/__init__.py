"""The references: plain PyTorch, any device, float64 included, differentiable twice. They are the law and the fallback."""
