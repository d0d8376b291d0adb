"""edgellm: run one quantized model over several small devices."""

__version__ = "0.1.0"
