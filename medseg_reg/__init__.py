"""Medical image segmentation on few labelled cases, with regularization at its heart."""

__version__ = "0.1.0"
