"""The look at data and set-up before a training, which check.py starts."""
