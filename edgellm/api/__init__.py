"""OpenAI-compatible HTTP over any model that the cluster runs: ``edgellm serve``."""
