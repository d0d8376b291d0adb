"""The parts of scripts/train_demo_model.py: text, vocabulary, network, file.

No part of the edgellm package, which must not import it.
"""
