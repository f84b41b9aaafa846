"""What all tests share: one thread, fixed seeds, toy models. Nothing here or in the tests uses network or GPU."""

import random

import numpy as np
import pytest
import timm
import torch

# Families a user may pair, and what makes toys of them.
FAMILIES = {
    'deit': 'deit_tiny_patch16_224',
    'distilled': 'deit_tiny_distilled_patch16_224',
    'cait': 'cait_s24_224',
    'registers': 'vit_small_patch14_reg4_dinov2',
}
TOY = {'img_size': 32, 'patch_size': 8, 'embed_dim': 32, 'depth': 3, 'num_heads': 2, 'num_classes': 10}


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def toy():
    """A function from a family's name and changes of its size to a timm model; the same weights at every call."""

    def make(family: str = 'deit', **changes) -> torch.nn.Module:
        torch.manual_seed(1)
        return timm.create_model(FAMILIES[family], **{**TOY, **changes})

    return make
