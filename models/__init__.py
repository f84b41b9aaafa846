"""Student and teacher: timm models, and wrappers that hand out the patch tokens of chosen blocks.

Letters: B images, N patch tokens, D channels, C classes.
"""

from models.tap import Output, TappedModel, freeze, tap
from models.weights import adapt, build, load_weights, named_weights

__all__ = [
    'Output',
    'TappedModel',
    'adapt',
    'build',
    'freeze',
    'load_weights',
    'named_weights',
    'tap',
]
