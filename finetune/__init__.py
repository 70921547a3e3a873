"""Training: nothing here yet; the layer above `convert` that will fine-tune converted models."""
