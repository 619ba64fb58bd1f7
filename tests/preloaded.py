"""What every run imports sooner or later; forked.py's server does it once for all of them."""

import io

import deepspeed  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard  # noqa: F401
from matplotlib.figure import Figure

import hsrgan.engine.train  # noqa: F401

Figure().savefig(io.BytesIO())  # fonts and the png writer
