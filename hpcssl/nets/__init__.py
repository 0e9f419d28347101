"""Networks: backbones, heads, encoder pairs and normalization; reading and writing of weights."""
