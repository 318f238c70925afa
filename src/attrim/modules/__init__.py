"""What several rooms need to know about an ``nn.Module``: names of tensors, copies with other tensors, attribute repair."""
