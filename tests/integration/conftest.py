"""What several files of whole runs start from."""

import pytest

from tests.tiny_models import make_tiny_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """An untied teacher and a tied student that share a tokenizer, with prompts."""
    return make_tiny_pair(tmp_path_factory.mktemp("pair"))
