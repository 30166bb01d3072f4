"""Arrays in, matplotlib figures out; matplotlib and no PyTorch. Every figure is readable at README width."""
