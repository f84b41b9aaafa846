"""Student and teacher: timm models, and wrappers that hand out the patch tokens of chosen blocks.

Letters: B images, N patch tokens, D channels, C classes.
"""

from models.blocks import Block, list_blocks
from models.build import (
    adapt,
    build,
    checksum,
    has_source,
    head_size,
    is_known,
    load_weights,
    match_head,
    named_weights,
    normalisation,
)
from models.grids import ALIGNMENTS, common_grid, format_grid, resample
from models.hooks import (
    Output,
    TappedModel,
    TeacherPreprocess,
    checkpoint_activations,
    compile_blocks,
    compile_model,
    freeze,
    pair_ids,
    tap,
)
from models.talking_heads import fused_talking_heads_problem, unfusible_heads, uses_fused_talking_heads

__all__ = [
    'ALIGNMENTS',
    'Block',
    'Output',
    'TappedModel',
    'TeacherPreprocess',
    'adapt',
    'build',
    'checkpoint_activations',
    'checksum',
    'common_grid',
    'compile_blocks',
    'compile_model',
    'format_grid',
    'freeze',
    'fused_talking_heads_problem',
    'has_source',
    'head_size',
    'is_known',
    'list_blocks',
    'load_weights',
    'match_head',
    'named_weights',
    'normalisation',
    'pair_ids',
    'resample',
    'tap',
    'unfusible_heads',
    'uses_fused_talking_heads',
]
