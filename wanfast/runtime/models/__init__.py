"""Pure `nn.Module`s: a forward pass depends on its arguments alone."""
