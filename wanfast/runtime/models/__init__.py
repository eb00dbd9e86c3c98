"""The models are pure `nn.Module`s: a forward pass depends only on its arguments and on the weights."""
