"""The parts of a model: text encoder, H-space UNet, adapter, injection, VAE, steps, and the bundle of all of them."""
